//! What the device layer does not offer, since the runtime does not want it:
//! write-combined host memory, and a graph of launches. Over `cudarc`'s own
//! layer, in the same primary context; not on the stand-in, which has neither.

use crate::{Scale, timing};
use cudarc::driver::{CudaContext, DriverError, LaunchConfig, PinnedHostSlice, sys};
use cudarc::nvrtc::Ptx;
use pregate_kernels::cuda::{CudaError, HostMemory};
use std::{slice, sync::Arc};

/// A kernel that does nothing, for every device that we have kernels for.
const EMPTY: &str = ".version 6.4\n.target sm_75\n.address_size 64\n\
                     .visible .entry empty() { ret; }\n";

/// Host memory that the processor writes past its caches, and reads slowly.
pub struct WriteCombined {
    memory: PinnedHostSlice<u8>,
    /// Where it is.
    address: usize,
}

/// The first bytes of such a block.
pub struct Part {
    block: Arc<WriteCombined>,
    bytes: usize,
}

fn on_a_gpu(scale: Scale) -> Result<Arc<CudaContext>, String> {
    match scale {
        Scale::Full => CudaContext::new(0).map_err(words),
        _ => Err("not on the stand-in".to_string()),
    }
}

fn words(error: DriverError) -> String {
    format!("failed: {error:?}")
}

impl WriteCombined {
    /// Zeros. Errors, in words: why it is not to be had.
    pub fn new(scale: Scale, bytes: usize) -> Result<Arc<Self>, String> {
        let context = on_a_gpu(scale)?;
        // SAFETY: every byte is written before any is read.
        let mut memory = unsafe { context.alloc_pinned::<u8>(bytes) }.map_err(words)?;
        let all = memory.as_mut_slice().map_err(words)?;
        all.fill(0);
        let address = all.as_ptr() as usize;
        Ok(Arc::new(Self { memory, address }))
    }

    pub fn part(self: &Arc<Self>, bytes: usize) -> Part {
        Part { block: self.clone(), bytes }
    }
}

// SAFETY: the block's memory does not move, lives as long as the part, and is
// never written after `new`.
unsafe impl HostMemory for Part {
    fn bytes(&self) -> &[u8] {
        let all = self.block.memory.num_bytes();
        // SAFETY: inside the block, which lives as long as this part and has
        // bytes in all of it. Cudarc's own slice asks the driver each time.
        unsafe { slice::from_raw_parts(self.block.address as *const u8, self.bytes.min(all)) }
    }
}

/// Seconds of `count` launches of nothing as one graph, with the wait for its
/// end. Errors, in words: why it could not be measured.
pub fn graph_seconds(scale: Scale, count: usize, repetitions: usize) -> Result<f64, String> {
    let context = on_a_gpu(scale)?;
    let stream = context.new_stream().map_err(words)?;
    let module = context.load_module(Ptx::from_src(EMPTY)).map_err(words)?;
    let empty = module.load_function("empty").map_err(words)?;
    let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
    stream.begin_capture(mode).map_err(words)?;
    let one_warp = LaunchConfig { grid_dim: (1, 1, 1), block_dim: (32, 1, 1), shared_mem_bytes: 0 };
    for _ in 0..count {
        // SAFETY: the kernel takes no arguments and touches no memory.
        unsafe { stream.launch_builder(&empty).launch(one_warp) }.map_err(words)?;
    }
    let graph = stream.end_capture(sys::CUgraphInstantiate_flags(0)).map_err(words)?;
    let graph = graph.ok_or("nothing was captured")?;
    let run = || {
        graph.launch().and_then(|()| stream.synchronize()).map_err(|error| CudaError::Api {
            call: "cuGraphLaunch",
            code: error.0 as u32,
            name: "of a graph",
        })
    };
    run().map_err(|error| error.to_string())?;
    timing::host_seconds(repetitions, run).map_err(|error| error.to_string())
}
