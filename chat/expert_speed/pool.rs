//! Memory that weights of every shape can be read from.

use crate::exit::Failure;
use pregate_runtime::store::frames::{ALIGN_BYTES, ClassSpec, FrameId, Frames, Pin};
use serde::Serialize;

/// Pages that the operating system is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Pages {
    /// As experts have them in this process, where the system has any.
    #[serde(rename = "2 MiB")]
    Huge,
    #[serde(rename = "4 KiB")]
    Small,
}

impl Pages {
    pub fn name(self) -> &'static str {
        match self {
            Pages::Huge => "2 MiB pages",
            Pages::Small => "4 KiB pages",
        }
    }
}

/// Memory that holds weights of every shape: bytes whose blocks are ordinary
/// numbers whatever the format.
pub struct Pool(Memory);

enum Memory {
    Huge(Pin),
    Small(Vec<u8>),
}

impl Pool {
    /// Of `bytes`, all of them written.
    pub fn new(pages: Pages, bytes: usize) -> Result<Self, Failure> {
        let bytes = bytes.next_multiple_of(ALIGN_BYTES);
        let refused = || Failure::Resources(format!("{} MiB of memory are needed", bytes >> 20));
        if pages == Pages::Small {
            let mut memory = Vec::new();
            memory.try_reserve_exact(bytes).map_err(|_| refused())?;
            memory.resize(bytes, 0);
            fill(&mut memory);
            return Ok(Self(Memory::Small(memory)));
        }
        let frames = Frames::new(&[ClassSpec { frame_bytes: bytes, frames: 1 }])?;
        let mut ticket = frames.claim(FrameId { class: 0, index: 0 }).ok_or_else(refused)?;
        fill(ticket.bytes_mut());
        let (frame, generation) = (ticket.frame(), ticket.generation());
        for chunk in ticket.chunks(std::slice::from_ref(&(0..bytes))) {
            let _ = chunk.done();
        }
        Ok(Self(Memory::Huge(frames.pin(frame, generation).ok_or_else(refused)?)))
    }

    pub fn bytes(&self) -> &[u8] {
        match &self.0 {
            Memory::Huge(pin) => pin,
            Memory::Small(memory) => memory,
        }
    }
}

/// Every byte is 0x5_: an f16 scale of 32 to 1000, an exponent of MXFP4 of
/// about -40, and codes that are not all alike.
fn fill(memory: &mut [u8]) {
    let mut state = 1u64;
    for part in memory.chunks_mut(8) {
        let word = 0x5050_5050_5050_5050 | random(&mut state) & 0x0f0f_0f0f_0f0f_0f0f;
        part.copy_from_slice(&word.to_le_bytes()[..part.len()]);
    }
}

/// Xorshift (Marsaglia 2003): 64 bits, never 0.
pub fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}
