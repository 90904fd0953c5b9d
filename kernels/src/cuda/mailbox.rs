//! Launchers of `kernels/cuda/mailbox.cu`: how the host and the device work on
//! one token together, without the host in between the kernels.
//!
//! A token is one list of launches, mostly a [`super::Graph`], that is
//! submitted at once. Before it the host writes the step block
//! ([`StepLayout`]); in it, [`begin_step`] takes that over; behind each router
//! [`post`] looks up which chosen experts are resident and tells the host
//! ([`MailboxLayout`]); [`settle`] waits for the host's decisions about those
//! that are not ([`super::Decision`]).
//!
//! Who writes what, and when:
//! - the step block, before the launch and after the step before has ended;
//! - a layer's mailbox, `post` of that layer in each step: the host reads it
//!   before it begins the next;
//! - decisions and rows of a layer, the host, once `post` of this step has
//!   asked for them: row first, decision after it;
//! - `slot_of`, [`begin_step`], and, behind a block's copy, the link
//!   ([`super::Transfer::publish`]): never both for one entry at a time, so an
//!   entry with an update that is not yet applied is not published;
//! - a block of the arena, the link, once no entry names it and the layer that
//!   might still use it was passed in this step.
//!
//! While `settle` waits, whatever waits for the whole device waits, too: the
//! host takes and frees no memory, and loads no module, between launch and
//! end; [`Stream::rehearse`] loads before the first one. Drivers load their own
//! kernels late as well, so that nothing is set or filled meanwhile, only copied.
//! Where it cannot go on it ends the step ([`super::Decision::give_up`])
//! before it waits for it. Launches one by one are given to the driver layer by
//! layer: its queue has room for about a thousand, and whoever fills it behind
//! a `settle` that waits for him waits until that has lost its patience.

use super::args::Args;
use super::mailbox_layout::{MOST_CHOICES, MailboxLayout, Pieces, StepLayout};
use super::position::STEP_WORDS;
use super::shape::{blocks, holds, holds_words, int, optional, product};
use super::stream::Grid;
use super::{CudaError, Device, Span, Stream};
use std::time::Duration;

const MODULE: &str = "mailbox";
const THREADS: u32 = 256;
/// Words of 4 bytes that a thread of [`begin_step`] copies: few, so that many
/// reads are under way across the link.
const WORDS_OF_THREAD: usize = 4;
/// Where blocks of an arena may start.
pub const ENTRY_BYTES: usize = 256;

/// Memory with blocks of experts. Its entries are u32: 0 for no block, else
/// `1 + offset / 256`.
#[derive(Clone, Copy)]
pub struct ExpertArena<'a> {
    /// All of it, at a multiple of 256 bytes.
    pub span: &'a Span,
    /// Bytes of a block of the layer: one that would end behind the arena is
    /// none. An arena that is shorter has none at all.
    pub block_bytes: usize,
}

impl ExpertArena<'_> {
    /// The entry of a block that starts at byte `offset`; `None` where none
    /// may.
    pub fn entry(offset: usize) -> Option<u32> {
        let is_start = offset.is_multiple_of(ENTRY_BYTES);
        (offset / ENTRY_BYTES).checked_add(1).filter(|_| is_start)?.try_into().ok()
    }

    /// The arena and how many starts it has.
    fn args(&self, call: &'static str, args: Args) -> Result<Args, CudaError> {
        let (bytes, block) = (self.span.bytes(), self.block_bytes);
        holds(call, "the arena", self.span, bytes, 1, ENTRY_BYTES as u64)?;
        let starts = bytes.checked_sub(block).map_or(0, |last| last / ENTRY_BYTES + 1);
        let starts = i32::try_from(starts).map_err(|_| {
            CudaError::shape(call, format!("an arena of {bytes} bytes has too many entries"))
        })?;
        Ok(args.span(self.span).i32(starts))
    }
}

/// The first launch of a token.
pub struct BeginStep<'a> {
    pub layout: StepLayout,
    /// [`StepLayout::bytes`] of [`super::Mapped`] memory.
    pub block: &'a Span,
    /// u32 `[entries]`: of all layers.
    pub slot_of: &'a Span,
    /// i32 `[4]`: gets step, position, 0, 0.
    pub words: &'a Span,
    /// [`StepLayout::input_bytes`] bytes, which get the step's inputs.
    pub inputs: &'a Span,
}

/// Takes a step block over: the step's words, its inputs, its updates of
/// entries.
///
/// # Errors
/// [`CudaError::Shape`] when sizes do not fit; the driver's.
pub fn begin_step(device: &Device, stream: &Stream, call: BeginStep<'_>) -> Result<(), CudaError> {
    const CALL: &str = "begin_step";
    let BeginStep { layout, block, slot_of, words, inputs } = call;
    let StepLayout { updates, input_bytes } = layout;
    if !input_bytes.is_multiple_of(4) {
        return Err(CudaError::shape(CALL, format!("{input_bytes} bytes of inputs")));
    }
    holds(CALL, "the step block", block, layout.bytes(), 1, 16)?;
    holds_words(CALL, "slot_of", slot_of, 0)?;
    holds_words(CALL, "the step words", words, STEP_WORDS)?;
    holds_words(CALL, "the inputs", inputs, input_bytes / 4)?;
    let at = layout.inputs_at();
    let args = Args::new()
        .span(&block.part(0..at))
        .i32(int(CALL, "updates", updates)?)
        .span(slot_of)
        .i32(int(CALL, "entries", slot_of.bytes() / 4)?)
        .span(words)
        .span(&block.part(at..at + input_bytes))
        .span(inputs)
        .i32(int(CALL, "words of inputs", input_bytes / 4)?);
    let count = (input_bytes / 4).max(updates).div_ceil(THREADS as usize * WORDS_OF_THREAD);
    let grid = Grid::new(blocks(CALL, count.max(1))?, THREADS);
    stream.launch(&device.kernel(MODULE, &["begin_step"])?, grid, args)
}

/// Logits of the routers of layers ahead, as [`super::RouterScratch`] has them.
#[derive(Clone, Copy)]
pub struct AheadLogits<'a> {
    /// f32 `[ahead, pitch]`, of which each row's first
    /// [`MailboxLayout::experts`] are posted; the last row may be as short.
    pub logits: &'a Span,
    pub pitch: usize,
}

/// A layer's choices, looked up and told.
pub struct Post<'a> {
    pub layout: MailboxLayout,
    /// [`MailboxLayout::bytes`] of [`super::Mapped`] memory.
    pub mailbox: &'a Span,
    /// i32 `[4]`, of [`begin_step`].
    pub words: &'a Span,
    /// i32 `[k]`
    pub ids: &'a Span,
    /// f32 `[k]`
    pub weights: &'a Span,
    /// u32 `[experts]`: the layer's part.
    pub slot_of: &'a Span,
    pub arena: ExpertArena<'a>,
    /// u64 `[experts]`: gets the addresses of the chosen experts' blocks, 0 of
    /// those that are missing; others stay as they are.
    pub table: &'a Span,
    /// u32: gets the mask of what is missing. An id that is none of the layer
    /// is missing, too.
    pub missing: &'a Span,
    /// With [`MailboxLayout::ahead`] rows, if that is not 0.
    pub ahead: Option<AheadLogits<'a>>,
    /// f32 `[hidden]`: what the experts multiply.
    pub x: &'a Span,
}

/// Runs [`Post`].
///
/// # Errors
/// [`CudaError::Shape`] when sizes do not fit; the driver's.
pub fn post(device: &Device, stream: &Stream, call: Post<'_>) -> Result<(), CudaError> {
    const CALL: &str = "post";
    let MailboxLayout { k, hidden, ahead, experts: wide } = call.layout;
    let experts = call.slot_of.bytes() / 4;
    check_choices(CALL, k, call.ids)?;
    holds(CALL, "the mailbox", call.mailbox, call.layout.bytes(), 1, 16)?;
    holds_words(CALL, "the step words", call.words, STEP_WORDS)?;
    holds_words(CALL, "the weights", call.weights, k)?;
    holds_words(CALL, "slot_of", call.slot_of, 0)?;
    holds(CALL, "the table", call.table, experts, 8, 8)?;
    holds_words(CALL, "the mask", call.missing, 1)?;
    holds_words(CALL, "x", call.x, hidden)?;
    let (logits, pitch) = match call.ahead {
        Some(AheadLogits { logits, pitch }) if ahead > 0 => {
            let last = product(CALL, &[ahead - 1, pitch])?;
            if wide > pitch {
                let problem = format!("rows of {wide} logits, {pitch} apart");
                return Err(CudaError::shape(CALL, problem));
            }
            holds_words(CALL, "the logits ahead", logits, last.saturating_add(wide))?;
            (Some(logits), pitch)
        }
        None if ahead == 0 => (None, 0),
        _ => return Err(CudaError::shape(CALL, format!("logits of {ahead} layers ahead"))),
    };
    let args = Args::new()
        .span(call.words)
        .span(call.ids)
        .span(call.weights)
        .i32(int(CALL, "k", k)?)
        .span(call.slot_of)
        .i32(int(CALL, "experts", experts)?);
    let args = call.arena.args(CALL, args)?.span(call.table).span(call.missing);
    let args = optional(args, logits)
        .i32(int(CALL, "pitch", pitch)?)
        .i32(int(CALL, "layers ahead", ahead)?)
        .i32(int(CALL, "logits ahead", product(CALL, &[ahead, wide])?).map(|_| wide as i32)?)
        .span(call.x)
        .i32(int(CALL, "hidden", hidden)?);
    let Pieces { flag, missing, ids, weights, ahead, x } = call.layout.pieces();
    let args = [flag, missing, ids, weights, ahead, x]
        .into_iter()
        .fold(args, |args, piece| args.span(&call.mailbox.part(piece)));
    stream.launch(&device.kernel(MODULE, &["post"])?, Grid::new(1, THREADS), args)
}

/// A layer's decisions, waited for.
pub struct Settle<'a> {
    /// i32 `[4]`, of [`begin_step`].
    pub words: &'a Span,
    /// u32: the mask that [`post`] left.
    pub missing: &'a Span,
    /// i32 `[k]`
    pub ids: &'a Span,
    pub k: usize,
    /// u64 `[k]` of [`super::Mapped`] memory: what [`super::Decision`] tells.
    pub decisions: &'a Span,
    pub arena: ExpertArena<'a>,
    /// How long the host may take; then the error word says so, and the
    /// choices are the host's, whatever its rows hold: the step is lost.
    pub patience: Duration,
    /// u64 of [`super::Mapped`] memory: see [`super::StepError`].
    pub error: &'a Span,
    /// u64 `[experts]`: gets at each chosen id the address of the block that
    /// came meanwhile, or 0.
    pub late: &'a Span,
    /// u32: gets the mask of the choices that are the host's.
    pub from_host: &'a Span,
}

/// Runs [`Settle`]. Ends at once where nothing is missing.
///
/// # Errors
/// [`CudaError::Shape`] when sizes do not fit; the driver's.
pub fn settle(device: &Device, stream: &Stream, call: Settle<'_>) -> Result<(), CudaError> {
    const CALL: &str = "settle";
    let (k, experts) = (call.k, call.late.bytes() / 8);
    check_choices(CALL, k, call.ids)?;
    holds_words(CALL, "the step words", call.words, STEP_WORDS)?;
    holds_words(CALL, "the mask", call.missing, 1)?;
    holds(CALL, "the decisions", call.decisions, k, 8, 8)?;
    holds(CALL, "the error word", call.error, 1, 8, 8)?;
    holds(CALL, "the late table", call.late, experts, 8, 8)?;
    holds_words(CALL, "the host's choices", call.from_host, 1)?;
    let args = Args::new()
        .span(call.words)
        .span(call.missing)
        .span(call.ids)
        .i32(int(CALL, "k", k)?)
        .i32(int(CALL, "experts", experts)?)
        .span(call.decisions);
    let args = (call.arena.args(CALL, args)?)
        .u64(u64::try_from(call.patience.as_nanos()).unwrap_or(u64::MAX))
        .span(call.error)
        .span(call.late)
        .span(call.from_host);
    stream.launch(&device.kernel(MODULE, &["settle"])?, Grid::new(1, 32), args)
}

fn check_choices(call: &'static str, k: usize, ids: &Span) -> Result<(), CudaError> {
    if k == 0 || k > MOST_CHOICES {
        return Err(CudaError::shape(call, format!("{k} choices, 1 to {MOST_CHOICES} allowed")));
    }
    holds_words(call, "the ids", ids, k)
}
