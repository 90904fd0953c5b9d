//! How what the host and the device tell each other lies in [`Mapped`] memory.

use super::error::CudaError;
use super::mapped::Mapped;
use std::ops::Range;

/// Choices of a token that a mask of 32 bits has room for.
pub const MOST_CHOICES: usize = 32;
/// Blocks of mapped memory start at a multiple of this: a line of the device.
const LINE_BYTES: usize = 128;

/// The step block: what the host writes before a token and
/// [`super::begin_step`] reads. Bytes: step u32, position i32, count u32, 0;
/// then as many updates, index u32 and entry u32; then the inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepLayout {
    /// Updates that it has room for.
    pub updates: usize,
    /// Bytes of the inputs, a multiple of 4.
    pub input_bytes: usize,
}

impl StepLayout {
    /// Where the inputs start: what goes to the device as it is.
    pub fn inputs_at(&self) -> usize {
        (16 + 8 * self.updates).next_multiple_of(LINE_BYTES)
    }

    /// Bytes of all, from the start of a mapped block.
    pub fn bytes(&self) -> usize {
        (self.inputs_at() + self.input_bytes).next_multiple_of(LINE_BYTES)
    }

    /// Writes all but the inputs, which the caller puts at
    /// [`StepLayout::inputs_at`]. The step before has ended.
    ///
    /// - `step`: not 0, and not the one before
    /// - `updates`: index into all of `slot_of`, and its new entry; no index
    ///   twice
    ///
    /// # Errors
    /// [`CudaError::Shape`] when there are too many updates, or a number does
    /// not fit.
    pub fn write(
        &self,
        block: &Mapped,
        step: u32,
        position: usize,
        updates: &[(u32, u32)],
    ) -> Result<(), CudaError> {
        let place = i32::try_from(position).ok().filter(|_| step != 0);
        let count = u32::try_from(updates.len()).ok().filter(|_| updates.len() <= self.updates);
        let (Some(place), Some(count)) = (place, count) else {
            let most = self.updates;
            let problem = format!(
                "step {step} at position {position} with {} updates, room for {most}",
                updates.len()
            );
            return Err(CudaError::shape("step", problem));
        };
        let put = |at: usize, pair: [u32; 2]| {
            block.write(at, pair.map(u32::to_ne_bytes).as_flattened());
        };
        put(0, [step, place.cast_unsigned()]);
        put(8, [count, 0]);
        for (number, (index, entry)) in updates.iter().enumerate() {
            put(16 + 8 * number, [*index, *entry]);
        }
        Ok(())
    }
}

/// What [`super::post`] tells the host of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MailboxLayout {
    /// Choices of the token, at most [`MOST_CHOICES`].
    pub k: usize,
    /// Elements of the state.
    pub hidden: usize,
    /// Layers ahead whose routers were asked.
    pub ahead: usize,
    /// Experts of each of those: how long their rows of logits are.
    pub experts: usize,
}

/// A layer's mailbox, as the host reads it. Made once, filled again and again.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Posted {
    pub step: u32,
    /// Bit i: choice i is not resident.
    pub missing: u32,
    /// `[k]`, in router order. They come from the device: to be checked.
    pub ids: Vec<i32>,
    /// `[k]`
    pub weights: Vec<f32>,
    /// `[ahead, experts]`: logits, bias included.
    pub ahead: Vec<f32>,
    /// `[hidden]`: what the experts multiply; of this step only where
    /// something is missing.
    pub x: Vec<f32>,
}

/// Where a mailbox's pieces are, in bytes from its start.
pub(super) struct Pieces {
    pub flag: Range<usize>,
    pub missing: Range<usize>,
    pub ids: Range<usize>,
    pub weights: Range<usize>,
    pub ahead: Range<usize>,
    pub x: Range<usize>,
}

impl MailboxLayout {
    pub(super) fn pieces(&self) -> Pieces {
        let behind = |end: usize, count: usize| {
            let start = end.next_multiple_of(16);
            start..start + 4 * count
        };
        let ids = behind(16, self.k);
        let weights = behind(ids.end, self.k);
        let ahead = behind(weights.end, self.ahead * self.experts);
        let x = behind(ahead.end, self.hidden);
        Pieces { flag: 0..8, missing: 8..12, ids, weights, ahead, x }
    }

    /// Bytes of a mailbox. Mailboxes start at multiples of 8, best one behind
    /// the other: this is a multiple of 128.
    pub fn bytes(&self) -> usize {
        self.pieces().x.end.next_multiple_of(LINE_BYTES)
    }

    /// Room for what [`MailboxLayout::read`] reads.
    pub fn posted(&self) -> Posted {
        Posted {
            step: 0,
            missing: 0,
            ids: vec![0; self.k],
            weights: vec![0.0; self.k],
            ahead: vec![0.0; self.ahead * self.experts],
            x: vec![0.0; self.hidden],
        }
    }

    /// Whether the layer of the mailbox that starts at byte `at` was passed in
    /// this step.
    pub fn is_posted(&self, mapped: &Mapped, at: usize, step: u32) -> bool {
        mapped.load_acquire(at / 8) == u64::from(step)
    }

    /// Reads the mailbox that starts at byte `at`, if it has this step's
    /// message; the state only if something is missing. Allocates nothing once
    /// `out` is of [`MailboxLayout::posted`]. The message stays until the
    /// next step begins.
    ///
    /// # Panics
    /// When there is no mailbox at `at`, as slices do.
    pub fn read(&self, mapped: &Mapped, at: usize, step: u32, out: &mut Posted) -> bool {
        assert!(at.is_multiple_of(8), "a mailbox at byte {at}");
        if !self.is_posted(mapped, at, step) {
            return false;
        }
        let Pieces { missing, ids, weights, ahead, x, .. } = self.pieces();
        let mut mask = [0; 4];
        mapped.read(at + missing.start..at + missing.end, &mut mask);
        out.step = step;
        out.missing = u32::from_ne_bytes(mask);
        out.ids.resize(self.k, 0);
        mapped.read_ints(at + ids.start, &mut out.ids);
        out.weights.resize(self.k, 0.0);
        mapped.read_floats(at + weights.start, &mut out.weights);
        out.ahead.resize(self.ahead * self.experts, 0.0);
        mapped.read_floats(at + ahead.start, &mut out.ahead);
        out.x.resize(self.hidden, 0.0);
        if out.missing != 0 {
            mapped.read_floats(at + x.start, &mut out.x);
        }
        true
    }
}

/// What becomes of a choice that is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The host computes it; its row is written.
    Host,
    /// It is in device memory now, with this entry (not 0).
    Resident(u32),
}

impl Decision {
    /// Tells [`super::settle`]: word `word` of `mapped` is that of the choice.
    /// Everything that the host wrote before, a row of answers too, is seen by
    /// the kernels behind it.
    ///
    /// # Panics
    /// When there is no such word, as slices do; for entry 0.
    pub fn tell(self, mapped: &Mapped, word: usize, step: u32) {
        let value = match self {
            Self::Host => 1,
            Self::Resident(0) => panic!("no block has entry 0"),
            // The largest entries lie outside of any arena.
            Self::Resident(entry) => entry.saturating_add(1),
        };
        mapped.store_release(word, u64::from(step) << 32 | u64::from(value));
    }

    /// Lets the device come to the end of a step whose answers nobody wants:
    /// every choice of `words` is the host's, whatever its rows hold.
    ///
    /// # Panics
    /// As [`Decision::tell`].
    pub fn give_up(mapped: &Mapped, words: Range<usize>, step: u32) {
        words.for_each(|word| Self::Host.tell(mapped, word, step));
    }
}

/// What went wrong on the device during a step: a code of its error word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StepError {
    /// [`super::settle`] waited for the host for longer than it may.
    Late { step: u32 },
    /// The host named a block outside the arena.
    BadEntry { step: u32 },
    /// No code of this program.
    Unknown { word: u64 },
}

impl StepError {
    /// What word `word` of `mapped` says; `None`: nothing.
    pub fn read(mapped: &Mapped, word: usize) -> Option<Self> {
        let word = mapped.load_acquire(word);
        let step = (word >> 32) as u32;
        match word as u32 {
            0 if step == 0 => None,
            1 => Some(Self::Late { step }),
            2 => Some(Self::BadEntry { step }),
            _ => Some(Self::Unknown { word }),
        }
    }
}
