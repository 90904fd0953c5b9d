//! Memory of the device and of the host, and copies between them. The
//! guarantee of [`super`] holds.

use super::super::error::{self, CudaError};
use super::{Driver, StreamHandle};
use cudarc::driver::sys;
use std::ffi::{c_uint, c_void};
use std::ptr;

/// Device memory of [`Driver::allocate`], in bytes behind its address.
pub(in crate::cuda) struct Block(u64);
/// Page-locked host memory of [`Driver::allocate_pinned`].
pub(in crate::cuda) struct PinnedBlock(usize);
/// The same of [`Driver::allocate_mapped`], and where the device finds it.
pub(in crate::cuda) struct MappedBlock {
    host: PinnedBlock,
    address: u64,
}

impl Block {
    pub(in crate::cuda) fn address(&self) -> u64 {
        self.0
    }
}

impl PinnedBlock {
    pub(in crate::cuda) fn pointer(&self) -> *mut u8 {
        self.0 as *mut u8
    }
}

impl MappedBlock {
    pub(in crate::cuda) fn pointer(&self) -> *mut u8 {
        self.host.pointer()
    }

    pub(in crate::cuda) fn address(&self) -> u64 {
        self.address
    }
}

impl Driver {
    /// Free and total device memory, in bytes.
    pub(in crate::cuda) fn memory(&self) -> Result<(u64, u64), CudaError> {
        let (mut free, mut total) = (0usize, 0usize);
        // SAFETY: pointers to locals.
        self.with_context("cuMemGetInfo", || unsafe {
            (self.functions.cuMemGetInfo_v2)(&mut free, &mut total)
        })?;
        Ok((free as u64, total as u64))
    }

    /// Device memory, at least 256-byte aligned, contents unspecified.
    pub(in crate::cuda) fn allocate(&self, bytes: usize) -> Result<Block, CudaError> {
        let mut address: sys::CUdeviceptr = 0;
        // SAFETY: pointer to a local.
        let result = self.with_context("cuMemAlloc", || unsafe {
            (self.functions.cuMemAlloc_v2)(&mut address, bytes)
        });
        match result {
            Ok(()) => Ok(Block(address)),
            Err(CudaError::Api { code: error::OUT_OF_MEMORY, .. }) => {
                Err(self.out_of_memory(bytes as u64))
            }
            Err(error) => Err(error),
        }
    }

    /// The device refused `needed` bytes: the error with what is free, or the
    /// one that asking for that met.
    pub(super) fn out_of_memory(&self, needed: u64) -> CudaError {
        match self.memory() {
            Ok((free, _)) => CudaError::OutOfMemory { needed, free },
            Err(error) => error,
        }
    }

    pub(in crate::cuda) fn free(&self, block: Block) {
        // SAFETY: the block is of `allocate` and gone after this. The driver
        // waits for work that uses it. An error is kept if it is sticky and
        // else means nothing: the block is gone.
        let _ =
            self.with_context("cuMemFree", || unsafe { (self.functions.cuMemFree_v2)(block.0) });
    }

    /// Page-locked memory of every context, cached by the CPU as usual,
    /// page-aligned.
    pub(in crate::cuda) fn allocate_pinned(&self, bytes: usize) -> Result<PinnedBlock, CudaError> {
        self.allocate_host(bytes, sys::CU_MEMHOSTALLOC_PORTABLE as c_uint)
    }

    /// The same that kernels may read and write.
    pub(in crate::cuda) fn allocate_mapped(&self, bytes: usize) -> Result<MappedBlock, CudaError> {
        let flags = sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
        let host = self.allocate_host(bytes, flags as c_uint)?;
        let mut address: sys::CUdeviceptr = 0;
        // SAFETY: pointer to a local; a live block; no flags.
        let found = self.with_context("cuMemHostGetDevicePointer", || unsafe {
            (self.functions.cuMemHostGetDevicePointer_v2)(&mut address, host.pointer().cast(), 0)
        });
        match found {
            Ok(()) => Ok(MappedBlock { host, address }),
            Err(error) => {
                self.free_pinned(host);
                Err(error)
            }
        }
    }

    /// Waits for the device, which may be using the block; where its end cannot
    /// be learnt, or a stream is being captured, the block is leaked.
    pub(in crate::cuda) fn free_mapped(&self, block: MappedBlock) {
        if self.wait_for_all() {
            self.free_pinned(block.host);
        }
    }

    fn allocate_host(&self, bytes: usize, flags: c_uint) -> Result<PinnedBlock, CudaError> {
        let mut pointer: *mut c_void = ptr::null_mut();
        // SAFETY: pointer to a local.
        let result = self.with_context("cuMemHostAlloc", || unsafe {
            (self.functions.cuMemHostAlloc)(&mut pointer, bytes, flags)
        });
        match result {
            Ok(()) => Ok(PinnedBlock(pointer as usize)),
            // Systems refuse with any code.
            Err(CudaError::Api { code, name, .. }) => {
                Err(CudaError::OutOfPinned { needed: bytes as u64, code, name })
            }
            Err(error) => Err(error),
        }
    }

    pub(in crate::cuda) fn free_pinned(&self, block: PinnedBlock) {
        // SAFETY: the block is of `allocate_host` and gone after this; no
        // copy uses it (`Ticket` and `Link` own what copies use), and no
        // kernel (`free_mapped` has waited). Errors as in `free`.
        let _ = self.with_context("cuMemFreeHost", || unsafe {
            (self.functions.cuMemFreeHost)(block.0 as *mut c_void)
        });
    }

    /// # Safety
    /// `from` is readable for `bytes`, and neither freed nor written before
    /// the copy has ended on the stream.
    pub(in crate::cuda) unsafe fn copy_in(
        &self,
        to: u64,
        from: *const u8,
        bytes: usize,
        stream: &StreamHandle,
    ) -> Result<(), CudaError> {
        // SAFETY: the caller's.
        self.with_context("cuMemcpyHtoDAsync", || unsafe {
            (self.functions.cuMemcpyHtoDAsync_v2)(to, from.cast(), bytes, stream.raw())
        })
    }

    /// # Safety
    /// `to` is writable for `bytes`, and neither freed nor touched before the
    /// copy has ended on the stream.
    pub(in crate::cuda) unsafe fn copy_out(
        &self,
        to: *mut u8,
        from: u64,
        bytes: usize,
        stream: &StreamHandle,
    ) -> Result<(), CudaError> {
        // SAFETY: the caller's.
        self.with_context("cuMemcpyDtoHAsync", || unsafe {
            (self.functions.cuMemcpyDtoHAsync_v2)(to.cast(), from, bytes, stream.raw())
        })
    }

    /// Copies device memory; host memory is not touched.
    pub(in crate::cuda) fn copy_on_device(
        &self,
        to: u64,
        from: u64,
        bytes: usize,
        stream: &StreamHandle,
    ) -> Result<(), CudaError> {
        // SAFETY: both ranges lie in spans of live arenas: the only caller,
        // `Stream::copy`, takes them from there.
        self.with_context("cuMemcpyDtoDAsync", || unsafe {
            (self.functions.cuMemcpyDtoDAsync_v2)(to, from, bytes, stream.raw())
        })
    }

    /// Sets a word of device memory.
    pub(in crate::cuda) fn set_word(
        &self,
        to: u64,
        word: u32,
        stream: &StreamHandle,
    ) -> Result<(), CudaError> {
        // SAFETY: the word lies in a span of a live arena: the only caller,
        // `flight.rs`, takes it from there.
        self.with_context("cuMemsetD32Async", || unsafe {
            (self.functions.cuMemsetD32Async)(to, word, 1, stream.raw())
        })
    }

    /// Sets device memory to one byte.
    pub(in crate::cuda) fn fill(
        &self,
        to: u64,
        byte: u8,
        bytes: usize,
        stream: &StreamHandle,
    ) -> Result<(), CudaError> {
        // SAFETY: the range lies in a span of a live arena: the only caller,
        // `Stream::fill`, takes it from there.
        self.with_context("cuMemsetD8Async", || unsafe {
            (self.functions.cuMemsetD8Async)(to, byte, bytes, stream.raw())
        })
    }
}
