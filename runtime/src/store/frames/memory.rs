//! Memory of frames: mapped, page-locked for copies to a device, or none.

use super::CLASS_ALIGN_BYTES;
use crate::error::{Error, Result};
use memmap2::{MmapOptions, MmapRaw};
use pregate_kernels::cuda::Pinned;
use std::ptr::NonNull;

/// Memory that nothing but the guards of frames dereferences.
pub(super) struct Memory {
    /// Owns what `start` points into.
    _owner: Owner,
    pub(super) start: NonNull<u8>,
}

enum Owner {
    /// There are no bytes.
    Nobody,
    Mapping {
        _mapping: MmapRaw,
    },
    PageLocked {
        _block: Pinned,
    },
}

// SAFETY: `start` is plain memory, without ties to a thread; who may touch
// which part of it when is the business of the guards.
unsafe impl Send for Memory {}
// SAFETY: as above: a `&Memory` gives out addresses, never references.
unsafe impl Sync for Memory {}

impl Memory {
    /// Anonymous and zeroed; pages come when they are first written.
    pub(super) fn mapped(bytes: usize) -> Result<Self> {
        let failed = |source| Error::Memory { what: "frames of experts", bytes, source };
        let too_large = || failed(std::io::ErrorKind::OutOfMemory.into());
        let mapped = bytes.checked_add(CLASS_ALIGN_BYTES).ok_or_else(too_large)?;
        let mapping = MmapRaw::from(MmapOptions::new().len(mapped).map_anon().map_err(failed)?);
        let skip = mapping.as_mut_ptr().align_offset(CLASS_ALIGN_BYTES);
        // Refused where the kernel has no huge pages: small ones serve.
        #[cfg(target_os = "linux")]
        let _ = mapping.advise_range(memmap2::Advice::HugePage, skip, bytes);
        // SAFETY: `skip` is less than the alignment, by which the mapping is
        // longer than `bytes`.
        let start = unsafe { mapping.as_mut_ptr().add(skip) };
        let start = NonNull::new(start).expect("a mapping does not start at address zero");
        Ok(Self { _owner: Owner::Mapping { _mapping: mapping }, start })
    }

    /// `block` from its first byte at a multiple of `align` on, zeroed.
    pub(super) fn page_locked(mut block: Pinned, align: usize) -> Self {
        block.fill(0);
        let skip = block.as_mut_ptr().align_offset(align);
        // From here on the block is only dropped: no reference to its bytes is
        // made but by the guards.
        let start = NonNull::from(&mut block[skip..]).cast();
        Self { _owner: Owner::PageLocked { _block: block }, start }
    }

    /// No bytes.
    pub(super) fn none() -> Self {
        Self { _owner: Owner::Nobody, start: NonNull::dangling() }
    }
}
