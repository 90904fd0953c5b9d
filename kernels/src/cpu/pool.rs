//! Persistent worker threads, pinned to cores, that share short parallel
//! regions: [`Shares`] hands out units, the caller works too, and the region
//! ends when every worker has left it.
//!
//! Workers spin for a while between regions (a token has hundreds of them),
//! then park. A panic in a unit is carried to the caller.

use super::shares::Shares;
use std::any::Any;
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, Thread};

/// `task(worker, unit)`.
type Task<'a> = dyn Fn(usize, usize) + Sync + 'a;

/// Polls before a waiting worker parks, and before it starts to yield.
const SPINS: usize = 40_000;
const SPINS_OVERSUBSCRIBED: usize = 200;

/// Locks `mutex`; a panic of another holder does not matter to scratch data.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a region's workers share. The slot is written by the caller before
/// `generation` is raised and cleared after `active` is back at zero.
struct Shared {
    generation: AtomicUsize,
    task: UnsafeCell<Option<Region>>,
    units: Shares,
    /// Workers that have not left the region yet.
    active: AtomicUsize,
    stop: AtomicBool,
    parked: Vec<AtomicBool>,
    /// Counts the calls of [`Pool::rouse`].
    roused: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    spins: usize,
}

#[derive(Clone, Copy)]
struct Region {
    task: *const Task<'static>,
}

// SAFETY: `task` is written only by the caller that holds `Pool::caller`,
// while no worker is in a region (`active == 0`), and read by workers only
// between an acquire load of `generation` and their release of `active`. The
// closure that it points to is `Sync`.
unsafe impl Sync for Shared {}
// SAFETY: as above; nothing in it is bound to a thread.
unsafe impl Send for Shared {}

/// A pool of `threads` workers, the caller included.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<(JoinHandle<()>, Thread)>,
    caller: Mutex<()>,
}

impl Pool {
    /// `threads - 1` threads are started and pinned to the cores after the
    /// first, if there are enough cores; the caller of each region is worker 0
    /// and is not pinned.
    ///
    /// # Errors
    /// The operating system refused a thread.
    pub fn new(threads: usize) -> std::io::Result<Self> {
        let threads = threads.max(1);
        let cores = core_affinity::get_core_ids().unwrap_or_default();
        let pin = cores.len() >= threads;
        let shared = Arc::new(Shared {
            generation: AtomicUsize::new(0),
            task: UnsafeCell::new(None),
            units: Shares::new(threads),
            active: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            parked: (1..threads).map(|_| AtomicBool::new(false)).collect(),
            roused: AtomicUsize::new(0),
            panic: Mutex::new(None),
            spins: if pin { SPINS } else { SPINS_OVERSUBSCRIBED },
        });
        let mut pool = Self { shared, workers: Vec::new(), caller: Mutex::new(()) };
        for worker in 1..threads {
            let shared = pool.shared.clone();
            let core = cores.get(worker).copied().filter(|_| pin);
            let handle =
                std::thread::Builder::new().name(format!("pregate-{worker}")).spawn(move || {
                    if let Some(core) = core {
                        core_affinity::set_for_current(core);
                    }
                    work(&shared, worker);
                })?;
            let thread = handle.thread().clone();
            pool.workers.push((handle, thread));
        }
        Ok(pool)
    }

    /// Workers, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(worker, unit)` once for every `unit < units`, with
    /// `worker < threads()` different for calls at the same time. A task must
    /// not start a region of the same pool.
    ///
    /// # Panics
    /// With the payload of the first unit that panicked, after all workers
    /// have left the region.
    pub fn run(&self, units: usize, task: &Task<'_>) {
        let _caller = lock(&self.caller);
        if self.workers.is_empty() || units <= 1 {
            (0..units).for_each(|unit| task(0, unit));
            return;
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime is changed. The pointer is used by workers
        // only while they are active in this region, and this function does
        // not return or unwind before `active` is zero: the caller's own share
        // runs under `catch_unwind`.
        let task: &'static Task<'static> = unsafe { std::mem::transmute(task) };
        // SAFETY: `caller` is held and `active` is zero, so nobody reads it.
        unsafe { *shared.task.get() = Some(Region { task }) };
        shared.units.deal(units);
        shared.active.store(self.workers.len(), Ordering::Relaxed);
        // Sequentially consistent with the worker's `parked` store and its
        // re-check of `generation`: one of the two sees the other.
        shared.generation.fetch_add(1, Ordering::SeqCst);
        for ((_, thread), parked) in self.workers.iter().zip(&shared.parked) {
            if parked.load(Ordering::SeqCst) {
                thread.unpark();
            }
        }
        share(shared, 0, Region { task });
        let mut spins = 0;
        while shared.active.load(Ordering::Acquire) != 0 {
            spins += 1;
            if spins < shared.spins { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        let panic = lock(&shared.panic).take();
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }

    /// A region comes soon: workers that are parked spin again for as long as
    /// after a region, and others begin anew.
    pub fn rouse(&self) {
        // As in `run`: one of the two sees the other.
        self.shared.roused.fetch_add(1, Ordering::SeqCst);
        for ((_, thread), parked) in self.workers.iter().zip(&self.shared.parked) {
            if parked.load(Ordering::SeqCst) {
                thread.unpark();
            }
        }
    }

    /// Workers that are parked now.
    #[cfg(test)]
    fn parked(&self) -> usize {
        self.shared.parked.iter().filter(|parked| parked.load(Ordering::SeqCst)).count()
    }

    /// Calls `task(worker, i, &mut items[i])` for every item.
    pub fn each_mut<T: Send>(&self, items: &mut [T], task: impl Fn(usize, usize, &mut T) + Sync) {
        let base = Base(items.as_mut_ptr());
        self.run(items.len(), &|worker, i| {
            let base = &base;
            // SAFETY: `run` calls this once for each `i < items.len()`, so the
            // references are in bounds and never alias; `items` stays borrowed
            // for the whole region.
            task(worker, i, unsafe { &mut *base.0.add(i) });
        });
    }

    /// Runs `work` on a thread of its own that keeps to the first core, so that
    /// the scheduler does not put it, worker 0 of the regions that it calls,
    /// beside a pinned worker. The calling thread waits, and stays as it is:
    /// threads that it starts later would have its core alone.
    ///
    /// # Errors
    /// The operating system refused a thread.
    pub fn pinned<T: Send>(&self, work: impl FnOnce() -> T + Send) -> std::io::Result<T> {
        let pinned = || {
            if let Some(core) = core_affinity::get_core_ids().unwrap_or_default().first() {
                core_affinity::set_for_current(*core);
            }
            work()
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("pregate-0".to_string());
            let done = thread.spawn_scoped(scope, pinned)?.join();
            Ok(done.unwrap_or_else(|panic| resume_unwind(panic)))
        })
    }
}

/// A base address that may travel to the workers.
struct Base<T>(*mut T);

// SAFETY: only `&mut` references to disjoint elements are made from it, on
// threads to which `T` may be sent.
unsafe impl<T: Send> Sync for Base<T> {}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.generation.fetch_add(1, Ordering::SeqCst);
        for (handle, thread) in self.workers.drain(..) {
            thread.unpark();
            // A worker never panics: units run under `catch_unwind`.
            let _ = handle.join();
        }
    }
}

/// Takes units until none is left.
fn share(shared: &Shared, worker: usize, region: Region) {
    let result = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: the caller's closure outlives the region, see `Pool::run`.
        let task = unsafe { &*region.task };
        while let Some(unit) = shared.units.take(worker) {
            task(worker, unit);
        }
    }));
    if let Err(payload) = result {
        // The others stop early; the region's results are lost anyway.
        shared.units.clear();
        lock(&shared.panic).get_or_insert(payload);
    }
}

fn work(shared: &Shared, worker: usize) {
    let mut seen = 0;
    loop {
        let (mut spins, mut calls) = (0, shared.roused.load(Ordering::SeqCst));
        while shared.generation.load(Ordering::Acquire) == seen {
            spins += 1;
            if spins < shared.spins {
                std::hint::spin_loop();
                continue;
            }
            let parked = &shared.parked[worker - 1];
            parked.store(true, Ordering::SeqCst);
            while shared.generation.load(Ordering::SeqCst) == seen
                && shared.roused.load(Ordering::SeqCst) == calls
            {
                std::thread::park();
            }
            parked.store(false, Ordering::SeqCst);
            (spins, calls) = (0, shared.roused.load(Ordering::SeqCst));
        }
        seen = seen.wrapping_add(1);
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        // SAFETY: the generation was raised after the slot was written, and
        // the slot is not written again before this worker lowers `active`.
        let region = unsafe { *shared.task.get() };
        if let Some(region) = region {
            share(shared, worker, region);
        }
        shared.active.fetch_sub(1, Ordering::Release);
    }
}

/// A matrix `[rows, width]` cut into rectangles by row and column bounds; each
/// rectangle is lent to one thread, at most once.
pub struct Grid<'a, T> {
    base: Base<T>,
    width: usize,
    row_bounds: &'a [usize],
    col_bounds: &'a [usize],
    taken: Vec<AtomicBool>,
    _borrow: PhantomData<&'a mut [T]>,
}

impl<'a, T: Send> Grid<'a, T> {
    /// Bounds rise and start anywhere; the last ones are at most the number
    /// of rows and the width.
    ///
    /// # Panics
    /// When they do not.
    pub fn new(
        data: &'a mut [T],
        width: usize,
        row_bounds: &'a [usize],
        col_bounds: &'a [usize],
    ) -> Self {
        assert!(row_bounds.is_sorted() && col_bounds.is_sorted(), "bounds must rise");
        assert!(col_bounds.last().is_some_and(|last| *last <= width), "column bound");
        let rows = *row_bounds.last().expect("row bounds");
        assert!(rows.checked_mul(width).is_some_and(|n| n <= data.len()), "row bound");
        let cells = (row_bounds.len() - 1) * (col_bounds.len() - 1);
        Self {
            base: Base(data.as_mut_ptr()),
            width,
            row_bounds,
            col_bounds,
            taken: (0..cells).map(|_| AtomicBool::new(false)).collect(),
            _borrow: PhantomData,
        }
    }

    /// Lends rectangle `(i, j)`.
    ///
    /// # Panics
    /// When it does not exist or was lent before.
    pub fn take(&self, i: usize, j: usize) -> Columns<'_, T> {
        let (rows, cols) = (&self.row_bounds[i..i + 2], &self.col_bounds[j..j + 2]);
        let cell = i * (self.col_bounds.len() - 1) + j;
        assert!(!self.taken[cell].swap(true, Ordering::AcqRel), "rectangle ({i}, {j}) twice");
        Columns {
            // SAFETY: `Grid::new` checked that the first element of the first
            // row of every rectangle lies in the slice (or one past its end).
            data: unsafe { self.base.0.add((rows[0] * self.width + cols[0]).min(self.end())) },
            stride: self.width,
            rows: rows[1] - rows[0],
            len: cols[1] - cols[0],
            _borrow: PhantomData,
        }
    }

    fn end(&self) -> usize {
        self.row_bounds[self.row_bounds.len() - 1] * self.width
    }
}

/// One rectangle of a [`Grid`], or of a matrix that one thread owns.
pub struct Columns<'g, T> {
    data: *mut T,
    stride: usize,
    rows: usize,
    len: usize,
    _borrow: PhantomData<&'g mut [T]>,
}

impl<'g, T> Columns<'g, T> {
    /// Columns `start .. start + len` of a whole matrix `[rows, width]`.
    pub fn of(data: &'g mut [T], width: usize, start: usize, len: usize) -> Self {
        assert!(width > 0 && start <= width && len <= width - start);
        let rows = data.len() / width;
        let data = &mut data[start.min(rows * width)..];
        Self { data: data.as_mut_ptr(), stride: width, rows, len, _borrow: PhantomData }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of each row.
    pub fn width(&self) -> usize {
        self.len
    }

    /// The columns of row `r`, counted from the rectangle's first row.
    pub fn row(&mut self, r: usize) -> &mut [T] {
        assert!(r < self.rows, "row {r} of {}", self.rows);
        // SAFETY: the rectangle lies in the borrowed slice (checked when the
        // grid was made), rectangles of a grid are disjoint and lent once, and
        // `&mut self` keeps rows of one rectangle from aliasing.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(r * self.stride), self.len) }
    }

    /// Rows `first .. first + rows` and columns `start .. start + len` of
    /// this rectangle.
    pub fn part(&mut self, first: usize, rows: usize, start: usize, len: usize) -> Columns<'_, T> {
        assert!(first <= self.rows && rows <= self.rows - first);
        assert!(start <= self.len && len <= self.len - start);
        let offset = if rows == 0 { 0 } else { first * self.stride + start };
        // SAFETY: with at least one row, the offset is inside the rectangle;
        // the part borrows `self` exclusively.
        let data = unsafe { self.data.add(offset) };
        Columns { data, stride: self.stride, rows, len, _borrow: PhantomData }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn every_unit_runs_once_on_any_number_of_threads() {
        for threads in [1, 2, 3, 7] {
            let pool = Pool::new(threads).unwrap();
            for units in [0usize, 1, 2, 5, 97] {
                for _ in 0..50 {
                    let counts: Vec<AtomicU32> = (0..units).map(|_| AtomicU32::new(0)).collect();
                    pool.run(units, &|worker, unit| {
                        assert!(worker < threads);
                        counts[unit].fetch_add(1, Ordering::Relaxed);
                    });
                    assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    fn who_has_work_pinned_may_run_where_it_could_before() {
        let cores = || core_affinity::get_core_ids().unwrap_or_default().len();
        let (pool, before) = (Pool::new(2).unwrap(), cores());
        let mut items = vec![0u32; 8];
        let pinned = pool.pinned(|| {
            pool.each_mut(&mut items, |_, _, item| *item += 1);
            cores()
        });
        assert_eq!((pinned.unwrap(), cores(), items), (before.min(1), before, vec![1; 8]));
        let panics = catch_unwind(AssertUnwindSafe(|| pool.pinned(|| panic!("inside"))));
        assert_eq!(panics.unwrap_err().downcast_ref(), Some(&"inside"));
    }

    #[test]
    fn stress_with_pauses_long_enough_to_park() {
        let pool = Pool::new(4).unwrap();
        let mut items = vec![0u64; 64];
        for round in 0..600u64 {
            pool.each_mut(&mut items, |_, i, item| *item += round ^ i as u64);
            if round % 150 == 0 {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        }
        for (i, item) in items.iter().enumerate() {
            assert_eq!(*item, (0..600u64).map(|r| r ^ i as u64).sum::<u64>());
        }
    }

    #[test]
    fn parked_workers_are_roused_and_park_again() {
        let pool = Pool::new(2).unwrap();
        let waits = |for_parked: usize| {
            let began = std::time::Instant::now();
            while pool.parked() != for_parked {
                assert!(began.elapsed().as_secs() < 60, "{} are parked", pool.parked());
                std::thread::yield_now();
            }
        };
        for _ in 0..3 {
            waits(1);
            // On a busy machine it may be long until the worker runs.
            let began = std::time::Instant::now();
            while pool.parked() != 0 {
                assert!(began.elapsed().as_secs() < 60, "nobody wakes");
                pool.rouse();
                std::thread::yield_now();
            }
        }
        waits(1);
        let ran = AtomicU32::new(0);
        pool.run(9, &|_, _| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.into_inner(), 9);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_survives() {
        let pool = Pool::new(3).unwrap();
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(100, &|_, unit| assert!(unit != 42, "unit 42"));
        }));
        let message = *result.unwrap_err().downcast::<&str>().unwrap();
        assert_eq!(message, "unit 42");
        let sum = AtomicUsize::new(0);
        pool.run(10, &|_, unit| {
            sum.fetch_add(unit, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }

    #[test]
    fn callers_on_several_threads_take_turns() {
        let pool = Pool::new(2).unwrap();
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        pool.run(8, &|_, _| {
                            total.fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 2400);
    }

    #[test]
    fn rectangles_are_disjoint_and_lent_once() {
        let mut data = vec![0u32; 6 * 10];
        let (rows, cols) = ([0, 2, 2, 6], [0, 3, 10]);
        let grid = Grid::new(&mut data, 10, &rows, &cols);
        for i in 0..3 {
            for j in 0..2 {
                let mut cell = grid.take(i, j);
                for r in 0..cell.rows() {
                    cell.row(r).iter_mut().for_each(|v| *v += (1 + i * 2 + j) as u32);
                }
            }
        }
        assert!(catch_unwind(AssertUnwindSafe(|| grid.take(0, 0).rows())).is_err());
        drop(grid);
        for (at, v) in data.iter().enumerate() {
            let (r, c) = (at / 10, at % 10);
            let (i, j) = (if r < 2 { 0 } else { 2 }, usize::from(c >= 3));
            assert_eq!(*v as usize, 1 + i * 2 + j);
        }
    }
}
