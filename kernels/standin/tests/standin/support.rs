//! Calls of the driver, through cudarc, for tests that want to do it wrong.
//!
//! Guarantee that the `unsafe` blocks rely on: the driver is the stand-in,
//! which checks handles, addresses and sizes, and answers with an error where
//! they are wrong; host memory that copies use is a [`Pinned`], which lives
//! until the machine is reset.

use cudarc::driver::{DriverError, result, sys};
use pregate_standin::{Exclusive, testing};
use std::ffi::{CString, c_void};

/// The stand-in for one test, with its context current, or `None`.
pub fn machine() -> Option<Machine> {
    let Some(standin) = testing::standin() else {
        println!("not run: needs the stand-in driver");
        return None;
    };
    let standin = standin.exclusive();
    standin.set_print(false);
    Some(Machine { standin })
}

pub struct Machine {
    pub standin: Exclusive<'static>,
}

/// What a call of the driver answers: its code.
pub type Code<T> = Result<T, u32>;

fn code<T>(result: Result<T, DriverError>) -> Code<T> {
    result.map_err(|error| error.0 as u32)
}

#[derive(Clone, Copy)]
pub struct Stream(sys::CUstream);
#[derive(Clone, Copy)]
pub struct Event(sys::CUevent);
#[derive(Clone, Copy)]
pub struct Graph(sys::CUgraphExec);

/// Page-locked memory; freed with the machine.
pub struct Pinned {
    at: *mut u8,
    bytes: usize,
}

// SAFETY: `store`, the only method that takes it shared and writes, is atomic.
unsafe impl Sync for Pinned {}

impl Pinned {
    pub fn set(&mut self, at: usize, byte: u8) {
        assert!(at < self.bytes);
        // SAFETY: inside the block; the stand-in touches it only in calls.
        unsafe { *self.at.add(at) = byte }
    }

    /// Where kernels find it.
    pub fn address(&self) -> u64 {
        self.at as u64
    }

    /// Word `index` of 8 bytes, which a kernel may read meanwhile.
    pub fn store(&self, index: usize, word: u64) {
        assert!(8 * index + 8 <= self.bytes);
        // SAFETY: inside the block, which is page-aligned; others touch the
        // word as an atomic one as well.
        unsafe { std::sync::atomic::AtomicU64::from_ptr(self.at.cast::<u64>().add(index)) }
            .store(word, std::sync::atomic::Ordering::Release);
    }

    pub fn fill(&mut self, byte: u8) {
        // SAFETY: as in `set`.
        unsafe { self.at.write_bytes(byte, self.bytes) }
    }

    pub fn to_vec(&self) -> Vec<u8> {
        // SAFETY: as in `set`; the stand-in has written all of it.
        unsafe { std::slice::from_raw_parts(self.at, self.bytes) }.to_vec()
    }
}

/// One argument of a kernel, its bytes first in memory.
pub fn number(value: impl Into<i64>) -> u64 {
    value.into() as u64
}

pub fn float(value: f32) -> u64 {
    u64::from(value.to_bits())
}

impl Machine {
    pub fn open(&self) -> Code<()> {
        code(result::init())?;
        let device = code(result::device::get(0))?;
        // SAFETY: a device of the driver.
        let context = code(unsafe { result::primary_ctx::retain(device) })?;
        // SAFETY: a context of the driver.
        code(unsafe { result::ctx::set_current(context) })
    }

    pub fn stream(&self) -> Stream {
        let kind = result::stream::StreamKind::NonBlocking;
        Stream(result::stream::create(kind).unwrap())
    }

    pub fn synchronize(&self, stream: Stream) -> Code<()> {
        // SAFETY: see above.
        code(unsafe { result::stream::synchronize(stream.0) })
    }

    pub fn allocate(&self, bytes: usize) -> Code<u64> {
        // SAFETY: see above.
        code(unsafe { result::malloc_sync(bytes) })
    }

    pub fn free(&self, address: u64) -> Code<()> {
        // SAFETY: see above.
        code(unsafe { result::free_sync(address) })
    }

    pub fn pinned(&self, bytes: usize) -> Code<Pinned> {
        // SAFETY: see above.
        let at = code(unsafe { result::malloc_host(bytes, 0) })?;
        Ok(Pinned { at: at.cast(), bytes })
    }

    pub fn free_pinned(&self, block: Pinned) -> Code<()> {
        // SAFETY: see above.
        code(unsafe { result::free_host(block.at.cast()) })
    }

    /// Device memory that holds these bytes.
    pub fn device(&self, bytes: &[u8]) -> u64 {
        let address = self.allocate(bytes.len()).unwrap();
        // SAFETY: see above; the call returns when the bytes are there.
        unsafe { result::memcpy_htod_sync(address, bytes) }.unwrap();
        address
    }

    /// `bytes` bytes of device memory, when the null stream has ended.
    pub fn read(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut out = vec![0; bytes];
        // SAFETY: see above.
        unsafe { result::memcpy_dtoh_sync(&mut out, address) }.unwrap();
        out
    }

    pub fn read_words(&self, address: u64, count: usize) -> Vec<u32> {
        let bytes = self.read(address, 4 * count);
        bytes.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
    }

    /// Sets words of 4 bytes.
    pub fn fill_words(&self, to: u64, word: u32, count: usize, stream: Stream) -> Code<()> {
        // SAFETY: see above.
        code(unsafe { sys::cuMemsetD32Async(to, word, count, stream.0).result() })
    }

    /// Whether everything in `stream` has ended.
    pub fn query_stream(&self, stream: Stream) -> Code<()> {
        // SAFETY: see above.
        code(unsafe { sys::cuStreamQuery(stream.0).result() })
    }

    pub fn synchronize_event(&self, event: Event) -> Code<()> {
        // SAFETY: see above.
        code(unsafe { result::event::synchronize(event.0) })
    }

    pub fn synchronize_all(&self) -> Code<()> {
        code(result::ctx::synchronize())
    }

    pub fn copy_in(&self, to: u64, from: &Pinned, stream: Stream) -> Code<()> {
        // SAFETY: see above: the driver is given the block, not a borrow.
        code(unsafe {
            let from = std::slice::from_raw_parts(from.at, from.bytes);
            result::memcpy_htod_async(to, from, stream.0)
        })
    }

    pub fn copy_in_pageable(&self, to: u64, from: &[u8], stream: Stream) -> Code<()> {
        // SAFETY: the stand-in copies a pageable source before it returns.
        code(unsafe { result::memcpy_htod_async(to, from, stream.0) })
    }

    pub fn copy_out(&self, to: &mut Pinned, from: u64, stream: Stream) -> Code<()> {
        // SAFETY: see above.
        code(unsafe {
            let to = std::slice::from_raw_parts_mut(to.at, to.bytes);
            result::memcpy_dtoh_async(to, from, stream.0)
        })
    }

    pub fn fill(&self, to: u64, byte: u8, bytes: usize, stream: Stream) -> Code<()> {
        // SAFETY: see above.
        code(unsafe { result::memset_d8_async(to, byte, bytes, stream.0) })
    }

    pub fn event(&self) -> Event {
        let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
        Event(result::event::create(flags).unwrap())
    }

    pub fn record(&self, event: Event, stream: Stream) -> Code<()> {
        // SAFETY: see above.
        code(unsafe { result::event::record(event.0, stream.0) })
    }

    pub fn query(&self, event: Event) -> Code<()> {
        // SAFETY: see above.
        code(unsafe { result::event::query(event.0) })
    }

    pub fn wait(&self, stream: Stream, event: Event) -> Code<()> {
        let flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: see above.
        code(unsafe { result::stream::wait_event(stream.0, event.0, flags) })
    }

    pub fn load(&self, image: &str) -> Code<sys::CUmodule> {
        let image = CString::new(image).unwrap();
        // SAFETY: zero-terminated text.
        code(unsafe { result::module::load_data(image.as_ptr().cast()) })
    }

    pub fn function(&self, module: sys::CUmodule, name: &str) -> Code<sys::CUfunction> {
        // SAFETY: see above.
        code(unsafe { result::module::get_function(module, CString::new(name).unwrap()) })
    }

    /// Launches a kernel of `tests/cuda`, its grid and block in one dimension.
    pub fn launch(
        &self,
        kernel: &str,
        [blocks, threads, shared_bytes]: [u32; 3],
        stream: Stream,
        args: &[u64],
    ) -> Code<()> {
        let known = self.standin.kernels();
        let (module, _) = known.iter().find(|(_, name)| name == kernel).expect("a kernel");
        let function = self.function(self.load(module)?, kernel)?;
        let mut cells = args.to_vec();
        let mut pointers: Vec<*mut c_void> =
            cells.iter_mut().map(|cell| std::ptr::from_mut(cell).cast()).collect();
        // SAFETY: see above; the arguments are copied before it returns.
        code(unsafe {
            result::launch_kernel(
                function,
                (blocks, 1, 1),
                (threads, 1, 1),
                shared_bytes,
                stream.0,
                &mut pointers,
            )
        })
    }

    /// [`Machine::launch`], and waits.
    pub fn run(&self, kernel: &str, shape: [u32; 3], args: &[u64]) -> Code<()> {
        let stream = self.stream();
        self.launch(kernel, shape, stream, args)?;
        self.synchronize(stream)
    }

    /// What `work` puts into `stream`, as a graph. `work` may load modules.
    pub fn capture(&self, stream: Stream, work: impl FnOnce()) -> Code<Graph> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: see above.
        unsafe {
            code(result::stream::begin_capture(stream.0, mode))?;
            work();
            let graph = code(result::stream::end_capture(stream.0))?;
            let mut exec = std::ptr::null_mut();
            code(sys::cuGraphInstantiateWithFlags(&mut exec, graph, 0).result())?;
            Ok(Graph(exec))
        }
    }

    pub fn launch_graph(&self, graph: Graph, stream: Stream) -> Code<()> {
        // SAFETY: see above.
        code(unsafe { result::graph::launch(graph.0, stream.0) })
    }
}
