//! Device memory that is allocated once and cut into spans, and page-locked
//! host memory that copies read and write directly.
//!
//! Guarantee that the `unsafe` blocks rely on: a [`Pinned`] block belongs to
//! one owner; copies take that owner by value and give it back when they have
//! ended (`ticket.rs`, `link.rs`), so no slice of it exists meanwhile.

use super::driver::{Block, Driver, MappedBlock, PinnedBlock};
use super::error::CudaError;
use std::fmt;
use std::ops::{Deref, DerefMut, Range};
use std::slice;
use std::sync::{Arc, Mutex, PoisonError};

/// Kernels may read whole aligned words of this many bytes around what they
/// were given; every arena is longer by as much.
pub const PADDING_BYTES: usize = 256;

/// One allocation of device memory, handed out in [`Span`]s from front to
/// back. Freed when the arena and its last span are gone.
pub struct Arena {
    memory: Arc<Memory>,
    /// Bytes that may be handed out.
    bytes: usize,
    taken: Mutex<usize>,
}

struct Memory {
    driver: Arc<Driver>,
    /// Taken by `drop`.
    block: Option<Held>,
}

/// What a span lies in.
enum Held {
    Device(Block),
    /// Of [`super::Mapped`].
    Host(MappedBlock),
}

impl fmt::Debug for Arena {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Arena({} of {} bytes free)", self.free_bytes(), self.bytes)
    }
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Span({} bytes at {:#x})", self.bytes, self.address())
    }
}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pinned({} bytes)", self.bytes)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        match self.block.take() {
            Some(Held::Device(block)) => self.driver.free(block),
            Some(Held::Host(block)) => self.driver.free_mapped(block),
            None => {}
        }
    }
}

impl Arena {
    pub(super) fn new(driver: &Arc<Driver>, bytes: usize) -> Result<Self, CudaError> {
        let padded = bytes
            .checked_add(PADDING_BYTES)
            .ok_or_else(|| CudaError::shape("arena", format!("{bytes} bytes overflow")))?;
        let block = driver.allocate(padded)?;
        let memory = Memory { driver: driver.clone(), block: Some(Held::Device(block)) };
        Ok(Self { memory: Arc::new(memory), bytes, taken: Mutex::new(0) })
    }

    /// The next `bytes`, at a multiple of `align` (a power of two of at most
    /// 256). Contents are unspecified.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] when the arena's rest is too small; no call
    /// of the driver is made.
    pub fn take(&self, bytes: usize, align: usize) -> Result<Span, CudaError> {
        if !align.is_power_of_two() || align > 256 {
            let problem = format!("alignment {align} is not a power of two of at most 256");
            return Err(CudaError::shape("arena", problem));
        }
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let start = taken.checked_next_multiple_of(align);
        let end = start.and_then(|start| start.checked_add(bytes));
        match (start, end) {
            (Some(offset), Some(end)) if end <= self.bytes => {
                *taken = end;
                Ok(Span { memory: self.memory.clone(), offset, bytes })
            }
            _ => Err(CudaError::OutOfMemory {
                needed: bytes as u64,
                free: (self.bytes - *taken) as u64,
            }),
        }
    }

    /// Takes everything back, to be handed out again.
    ///
    /// # Errors
    /// [`CudaError::Shape`] when a span is still alive: somebody may use it.
    pub fn rewind(&mut self) -> Result<(), CudaError> {
        match Arc::strong_count(&self.memory) {
            1 => {
                *self.taken.get_mut().unwrap_or_else(PoisonError::into_inner) = 0;
                Ok(())
            }
            alive => {
                let problem = format!("cannot be rewound: {} of its spans are alive", alive - 1);
                Err(CudaError::shape("arena", problem))
            }
        }
    }

    /// Bytes that may be handed out, also those that were.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes that are left.
    pub fn free_bytes(&self) -> usize {
        self.bytes - *self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A range of an [`Arena`] or of [`super::Mapped`] memory, which it keeps
/// alive.
#[derive(Clone)]
pub struct Span {
    memory: Arc<Memory>,
    /// In bytes from the start of the arena.
    offset: usize,
    bytes: usize,
}

impl Span {
    /// All of a mapped block, whose `bytes` have the padding behind them.
    pub(super) fn of_mapped(driver: &Arc<Driver>, block: MappedBlock, bytes: usize) -> Self {
        let memory = Memory { driver: driver.clone(), block: Some(Held::Host(block)) };
        Self { memory: Arc::new(memory), offset: 0, bytes }
    }

    /// Where it starts, for the device.
    pub fn address(&self) -> u64 {
        match &self.memory.block {
            Some(Held::Device(block)) => block.address() + self.offset as u64,
            Some(Held::Host(block)) => block.address() + self.offset as u64,
            None => 0,
        }
    }

    /// Whether it is memory of the host, of [`super::Mapped`].
    pub(super) fn is_mapped(&self) -> bool {
        matches!(self.memory.block, Some(Held::Host(_)))
    }

    /// Whether both keep the same allocation alive.
    pub(super) fn shares_memory(&self, other: &Span) -> bool {
        Arc::ptr_eq(&self.memory, &other.memory)
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The part of it from `range.start` to `range.end`, in bytes.
    ///
    /// # Panics
    /// When the range does not lie in it, as slices do.
    pub fn part(&self, range: Range<usize>) -> Span {
        assert!(
            range.start <= range.end && range.end <= self.bytes,
            "part {range:?} of a span of {} bytes",
            self.bytes
        );
        Span {
            memory: self.memory.clone(),
            offset: self.offset + range.start,
            bytes: range.end - range.start,
        }
    }

    /// Whether it is memory of this driver's device.
    pub(super) fn is_of(&self, driver: &Arc<Driver>) -> bool {
        Arc::ptr_eq(&self.memory.driver, driver)
    }
}

/// A block of page-locked host memory: copies to and from the device run at
/// the link's speed while the CPU goes on. Cached as ordinary memory is, and
/// usable by every context.
///
/// After a sticky error the block is never freed: the device may still be
/// reading it, and the driver must not be called.
pub struct Pinned {
    driver: Arc<Driver>,
    /// Taken by `drop`.
    block: Option<PinnedBlock>,
    bytes: usize,
}

impl Pinned {
    pub(super) fn new(driver: &Arc<Driver>, bytes: usize) -> Result<Self, CudaError> {
        // The driver refuses nothing.
        let block = driver.allocate_pinned(bytes.max(1))?;
        Ok(Self { driver: driver.clone(), block: Some(block), bytes })
    }

    pub(super) fn pointer(&self) -> *mut u8 {
        self.block.as_ref().map_or(std::ptr::NonNull::dangling().as_ptr(), PinnedBlock::pointer)
    }
}

impl Deref for Pinned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: `bytes` bytes of a live allocation of the driver, whose
        // contents are always some bytes; a copy that writes them owns `self`.
        unsafe { slice::from_raw_parts(self.pointer(), self.bytes) }
    }
}

impl DerefMut for Pinned {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; `self` is borrowed mutably, and a copy that reads
        // them owns it, or reads others than are written (`flight::Words`).
        unsafe { slice::from_raw_parts_mut(self.pointer(), self.bytes) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            self.driver.free_pinned(block);
        }
    }
}

/// A part of a [`Pinned`] block that several copies may read at once.
#[derive(Clone, Debug)]
pub struct PinnedPart {
    block: Arc<Pinned>,
    range: Range<usize>,
}

impl PinnedPart {
    /// Bytes `range` of a block that nobody can write any more.
    ///
    /// # Errors
    /// [`CudaError::Shape`] when the range does not lie in the block.
    pub fn new(block: Arc<Pinned>, range: Range<usize>) -> Result<Self, CudaError> {
        if range.start > range.end || range.end > block.len() {
            let problem = format!("part {range:?} of {} page-locked bytes", block.len());
            return Err(CudaError::shape("pinned", problem));
        }
        Ok(Self { block, range })
    }
}

/// Host memory that a copy to the device may read after the call that
/// submitted it has returned.
///
/// Memory that is not page-locked works as well: the driver copies it first,
/// and the caller waits for that.
///
/// # Safety
/// For as long as the value lives, wherever it is moved, [`HostMemory::bytes`]
/// is the same memory, and nobody writes to it.
pub unsafe trait HostMemory: Send + 'static {
    fn bytes(&self) -> &[u8];
}

// SAFETY: the block's memory does not move with its owner, and writing needs
// the owner itself.
unsafe impl HostMemory for Pinned {
    fn bytes(&self) -> &[u8] {
        self
    }
}

// SAFETY: the part holds an `Arc`, so nobody can borrow the block mutably.
unsafe impl HostMemory for PinnedPart {
    fn bytes(&self) -> &[u8] {
        &self.block[self.range.clone()]
    }
}

// SAFETY: shared, and without interior mutability, as long as it is held.
unsafe impl HostMemory for Arc<[u8]> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

// SAFETY: that of its contents, which do not move with the box.
unsafe impl<M: HostMemory + ?Sized> HostMemory for Box<M> {
    fn bytes(&self) -> &[u8] {
        (**self).bytes()
    }
}

/// Host memory that a copy from the device may write after the call that
/// submitted it has returned.
///
/// # Safety
/// [`HostTarget::start`] is where [`HostMemory::bytes`] are, which may be
/// written as long as nobody else has the value.
pub unsafe trait HostTarget: HostMemory {
    fn start(&mut self) -> *mut u8;
}

// SAFETY: the block of which `self` is the only owner.
unsafe impl HostTarget for Pinned {
    fn start(&mut self) -> *mut u8 {
        self.pointer()
    }
}

/// What small copies go through: page-locked, or any memory where the system
/// gives no such, whose copies take longer.
pub(super) enum Staging {
    Pinned(Pinned),
    Pageable(Vec<u8>),
}

impl Staging {
    /// Error: the device failed.
    pub fn new(driver: &Arc<Driver>, bytes: usize) -> Result<Self, CudaError> {
        match Pinned::new(driver, bytes) {
            Ok(block) => Ok(Self::Pinned(block)),
            Err(error) if error.is_sticky() => Err(error),
            Err(_) => Ok(Self::Pageable(vec![0; bytes])),
        }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Pinned(block) => block,
            Self::Pageable(bytes) => bytes,
        }
    }
}

// SAFETY: neither kind of memory moves with its owner; writing needs it.
unsafe impl HostMemory for Staging {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Pinned(block) => block,
            Self::Pageable(bytes) => bytes,
        }
    }
}

// SAFETY: both are owned by `self` alone.
unsafe impl HostTarget for Staging {
    fn start(&mut self) -> *mut u8 {
        match self {
            Self::Pinned(block) => block.pointer(),
            Self::Pageable(bytes) => bytes.as_mut_ptr(),
        }
    }
}

/// Host memory that copies read: page-locked where the system gives so much,
/// else any, whose copies the driver makes through memory of its own.
#[derive(Clone, Debug)]
pub enum HostPart {
    Pinned(PinnedPart),
    Pageable(Arc<[u8]>),
}

// SAFETY: that of its variants.
unsafe impl HostMemory for HostPart {
    fn bytes(&self) -> &[u8] {
        match self {
            HostPart::Pinned(part) => part.bytes(),
            HostPart::Pageable(bytes) => bytes,
        }
    }
}
