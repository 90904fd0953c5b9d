//! A stand-in for libcuda, for tests on machines without a GPU.
//!
//! `build.rs` compiles `kernels/cuda` with the machine's C++ compiler into a
//! library that answers to the name `libcuda.so`; [`Standin::load`] brings it
//! into the process before cudarc looks for a driver, and the real cudarc
//! talks to it. Kernels run on the CPU, one fiber per CUDA thread, in random
//! order, and every access to memory is checked: bounds, alignment, races in
//! shared memory, barriers that not all threads reach. Copies and kernels land
//! as late as the driver may let them ([`Drain`]), targets hold poison until
//! then, and calls fail where a test wants them to.
//!
//! Sources that differ between targets are those of compute_80, on a device of
//! capability 8.6; built with `PREGATE_STANDIN_ARCH=75`, those of compute_75 on
//! a device of capability 7.5.
//!
//! Without a C++ compiler there is no library and [`Standin::load`] is `None`.
//!
//! What it cannot tell: timing, the memory model between blocks, what ptxas
//! makes of the PTX.

mod library;
pub mod testing;

use library::Library;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// When the work in streams is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drain {
    /// When somebody waits for it, and not before.
    Lazy,
    /// At once, as far as events allow.
    Eager,
    /// A few pieces of random streams after each call; a seed.
    Random(u64),
}

/// A fault that a call of the driver meets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The call fails and has no effect.
    Once,
    /// The call and every later one fail; work under way is lost.
    Sticky,
    /// The call succeeds; the one after it answers with the code.
    Delayed,
    /// The same, and every call after that one fails.
    DelayedSticky,
}

/// The stand-in driver of this process.
///
/// It is one machine: tests that change its settings or count its calls hold
/// [`Standin::exclusive`], or a turn of their own.
pub struct Standin {
    library: Library,
    turn: Mutex<()>,
}

/// The stand-in for one test alone, as it is at the start of a process; it is
/// so again when this goes.
pub struct Exclusive<'a> {
    standin: &'a Standin,
    _turn: MutexGuard<'a, ()>,
}

impl std::ops::Deref for Exclusive<'_> {
    type Target = Standin;
    fn deref(&self) -> &Standin {
        self.standin
    }
}

impl Drop for Exclusive<'_> {
    fn drop(&mut self) {
        self.standin.reset();
    }
}

impl Standin {
    /// The library's file, or `None` when it was built without a C++ compiler.
    pub fn path() -> Option<&'static Path> {
        option_env!("PREGATE_STANDIN_LIBRARY").map(Path::new)
    }

    /// Brings the stand-in into this process, once. Call it before anything
    /// asks cudarc for a driver.
    ///
    /// # Panics
    /// If the library was built and cannot be loaded: with the address
    /// sanitizer, that means that `LD_PRELOAD` does not name libasan.
    pub fn load() -> Option<&'static Self> {
        static LOADED: OnceLock<Option<Standin>> = OnceLock::new();
        LOADED
            .get_or_init(|| {
                let library =
                    Library::open(Self::path()?).unwrap_or_else(|error| panic!("{error}"));
                Some(Self { library, turn: Mutex::new(()) })
            })
            .as_ref()
    }

    /// Whether the library is built with the address sanitizer, which sees
    /// heap and stack, but no races.
    pub fn has_address_sanitizer() -> bool {
        option_env!("PREGATE_STANDIN_VARIANT").is_some_and(|name| name.starts_with("address"))
    }

    /// Whether the sources are compiled for compute_75: no asynchronous copies.
    pub fn is_turing() -> bool {
        option_env!("PREGATE_STANDIN_VARIANT").is_some_and(|name| name.ends_with("_75"))
    }

    /// The stand-in for the caller alone, among those who call this.
    pub fn exclusive(&self) -> Exclusive<'_> {
        let turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.reset();
        Exclusive { standin: self, _turn: turn }
    }

    /// One line of `driver/control.cpp`: `drain=lazy`, `fail=12:2`, `reset`.
    ///
    /// # Panics
    /// If the line is not known.
    pub fn command(&self, line: &str) {
        assert!(self.library.control(line), "the stand-in does not know {line:?}");
    }

    /// A number of `pregate_standin_count`, as `calls:cuMemAlloc`.
    pub fn count(&self, what: &str) -> u64 {
        self.library.count(what)
    }

    /// A machine as new: no context, no memory, no work, no faults; settings
    /// of `PREGATE_STANDIN`, or the default ones. Nobody may be using it.
    pub fn reset(&self) {
        self.command("reset");
    }

    pub fn set_drain(&self, drain: Drain) {
        match drain {
            Drain::Lazy => self.command("drain=lazy"),
            Drain::Eager => self.command("drain=eager"),
            Drain::Random(seed) => self.command(&format!("drain=random:{seed}")),
        }
    }

    /// Seed of the order in which blocks and threads run; 0: in index order.
    pub fn set_order(&self, seed: u64) {
        self.command(&format!("order={seed}"));
    }

    /// How often in a row a launch may go on without a thread doing more than
    /// to pause again; once more is a violation. The clock that kernels see
    /// counts how often theirs has gone on.
    pub fn set_spins(&self, spins: u64) {
        self.command(&format!("spins={spins}"));
    }

    /// Whether every access of a kernel that is launched from now on is looked
    /// at: bounds, alignment, races, collectives that lanes do not do together.
    /// Without, kernels are faster, and one that does what it may not does so
    /// unseen, or crashes.
    pub fn set_checks(&self, checks: bool) {
        self.command(if checks { "checks=on" } else { "checks=off" });
    }

    /// Device memory there is.
    pub fn set_vram(&self, bytes: u64) {
        self.command(&format!("vram={bytes}"));
    }

    /// Page-locked memory there is.
    pub fn set_pinned(&self, bytes: u64) {
        self.command(&format!("pinned={bytes}"));
    }

    /// The CUDA version of the driver, as `12_040`.
    pub fn set_driver_version(&self, version: u32) {
        self.command(&format!("driver={version}"));
    }

    pub fn set_devices(&self, devices: u32) {
        self.command(&format!("devices={devices}"));
    }

    /// What `cuInit` answers.
    pub fn set_init_code(&self, code: u32) {
        self.command(&format!("init={code}"));
    }

    /// Compute capability.
    pub fn set_capability(&self, major: u32, minor: u32) {
        self.command(&format!("capability={major}.{minor}"));
    }

    /// Whether violations are also written to stderr when they are found.
    pub fn set_print(&self, print: bool) {
        self.command(&format!("print={}", u32::from(print)));
    }

    /// The `nth` call from now (1 is the next) meets a fault with `code`.
    pub fn fail(&self, nth: u64, fault: Fault, code: u32) {
        self.command(&format!("{}={nth}:{code}", fault.key()));
    }

    /// The `nth` call of `name` from now (`cuMemAlloc`, without `_v2`).
    pub fn fail_call(&self, name: &str, nth: u64, fault: Fault, code: u32) {
        self.command(&format!("{}={name}:{nth}:{code}", fault.key()));
    }

    /// The `nth` record of an event from now never completes, until
    /// [`Standin::release`]: questions answer "not ready", waits do not end.
    pub fn hang(&self, nth: u64) {
        self.command(&format!("hang={nth}"));
    }

    pub fn release(&self) {
        self.command("release");
    }

    /// No more faults; sticky ones are forgotten, hung events go on.
    pub fn clear_faults(&self) {
        self.command("clear_faults");
    }

    /// Calls of the driver, those for the names of errors not counted.
    pub fn calls(&self) -> u64 {
        self.count("calls")
    }

    pub fn calls_of(&self, name: &str) -> u64 {
        self.count(&format!("calls:{name}"))
    }

    pub fn launches_of(&self, kernel: &str) -> u64 {
        self.count(&format!("launches:{kernel}"))
    }

    /// Violations that are races: between threads of a block, or between the
    /// host and a copy.
    pub fn races(&self) -> u64 {
        self.count("races")
    }

    /// What was done wrong so far, in words: kernel, block, thread, byte, line.
    pub fn violations(&self) -> Vec<String> {
        (0..self.count("violations")).map(|index| self.library.violation(index)).collect()
    }

    /// [`Standin::violations`], which are forgotten.
    pub fn take_violations(&self) -> Vec<String> {
        let found = self.violations();
        self.command("forget_violations");
        found
    }

    /// All kernels: the `.cu` file's name without its end, and the kernel's.
    pub fn kernels(&self) -> Vec<(String, String)> {
        let text = self.library.kernels();
        let pairs = text.lines().filter_map(|line| line.split_once(' '));
        pairs.map(|(module, name)| (module.to_string(), name.to_string())).collect()
    }
}

impl Fault {
    fn key(self) -> &'static str {
        match self {
            Self::Once => "fail",
            Self::Sticky => "sticky",
            Self::Delayed => "delayed",
            Self::DelayedSticky => "delayed_sticky",
        }
    }
}
