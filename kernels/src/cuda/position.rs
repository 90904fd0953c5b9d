//! Where a launch takes the position of its first token from.

use super::args::Args;
use super::error::CudaError;
use super::memory::Span;
use super::shape::{holds_words, int};

/// Words of a step: step, position, and two that are not used.
pub const STEP_WORDS: usize = 4;

/// The position of a launch's first token. Answers are the same, bit for bit,
/// wherever it comes from.
///
/// A launch at [`At::Step`] has no argument that changes from token to token,
/// so one captured graph of such launches serves every position below `most`.
/// What that costs: attention has a block per chunk of `most` positions (or of
/// the window, where that is less), and one whose chunk the token does not see
/// reads the position and ends. With graphs for `most` at powers of two, at
/// most half of the blocks do.
#[derive(Clone, Copy)]
pub enum At<'a> {
    /// An argument.
    Host(usize),
    /// Word 1 of what `begin_step` leaves on the device.
    Step {
        /// i32 `[4]`: step, position, 0, 0
        words: &'a Span,
        /// Positions that the launch is sized for, the call's tokens among
        /// them: caches and scratch memory hold so many. A call further on
        /// computes as if it ended there; nothing tells that it did.
        most: usize,
    },
}

impl At<'_> {
    /// Positions that `tokens` tokens can reach: what cells must hold.
    pub(super) fn positions(&self, tokens: usize) -> usize {
        match *self {
            At::Host(first) => first.saturating_add(tokens),
            At::Step { most, .. } => most,
        }
    }

    /// The pointer to the step words, or null, and `first`, as
    /// `first_position_of` in `kernels/cuda/position.cuh` reads them.
    pub(super) fn args(
        &self,
        call: &'static str,
        args: Args,
        tokens: usize,
    ) -> Result<Args, CudaError> {
        match *self {
            At::Host(first) => Ok(args.address(0).i32(int(call, "first position", first)?)),
            At::Step { words, most } => {
                holds_words(call, "step words", words, STEP_WORDS)?;
                let last = most.checked_sub(tokens).ok_or_else(|| {
                    CudaError::shape(call, format!("{tokens} tokens in {most} positions"))
                })?;
                Ok(args.span(words).i32(int(call, "most positions", last)?))
            }
        }
    }
}
