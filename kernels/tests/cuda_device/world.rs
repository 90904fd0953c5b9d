//! The machines that these tests run on: the stand-in driver, whose settings
//! a test chooses, or any device. One test at a time, since a driver is one
//! for the whole process.

use pregate_kernels::cuda::{CudaError, Device, DeviceOptions, Modules};
use pregate_kernels::testing::Random;
use pregate_standin::{Exclusive, testing};

pub use pregate_standin::{Drain, Fault};

#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub drain: Drain,
    pub vram_bytes: u64,
    pub pinned_bytes: u64,
    pub driver_version: u32,
    pub devices: u32,
    /// What `cuInit` returns.
    pub init_code: u32,
    pub capability: (u32, u32),
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            drain: Drain::Lazy,
            vram_bytes: 64 << 20,
            pinned_bytes: 64 << 20,
            driver_version: 12_040,
            devices: 1,
            init_code: 0,
            capability: (8, 6),
        }
    }
}

/// One setting for each way to drain streams.
pub fn drains() -> impl Iterator<Item = Settings> {
    let drains = [Drain::Lazy, Drain::Eager, Drain::Random(1), Drain::Random(2), Drain::Random(3)];
    drains.into_iter().map(|drain| Settings { drain, ..Settings::default() })
}

/// What was made and not destroyed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alive {
    pub device_blocks: u64,
    pub pinned_blocks: u64,
    pub streams: u64,
    pub events: u64,
    pub modules: u64,
    pub contexts: u64,
}

impl Alive {
    pub fn sum(&self) -> u64 {
        let Self { device_blocks, pinned_blocks, streams, events, modules, contexts } = self;
        device_blocks + pinned_blocks + streams + events + modules + contexts
    }
}

/// The stand-in, for one test.
pub struct World {
    machine: Exclusive<'static>,
}

/// The stand-in with these settings and nothing in it; `None` where tests run
/// on a GPU or there is no stand-in.
pub fn standin(settings: Settings) -> Option<World> {
    let Some(machine) = testing::standin() else {
        println!("not run: needs the stand-in driver");
        return None;
    };
    let world = World { machine: machine.exclusive() };
    world.reset(settings);
    Some(world)
}

/// The stand-in or a GPU, for one test.
pub fn any_device() -> Option<(Option<World>, Device)> {
    let world = testing::standin().and_then(|_| standin(Settings::default()));
    let device = testing::device()?;
    Some((world, device))
}

impl World {
    /// Everything as new, with these settings.
    pub fn reset(&self, settings: Settings) {
        let Settings {
            drain, vram_bytes, pinned_bytes, driver_version, devices, init_code, ..
        } = settings;
        let (major, minor) = settings.capability;
        let machine = &self.machine;
        machine.reset();
        machine.set_drain(drain);
        machine.set_vram(vram_bytes);
        machine.set_pinned(pinned_bytes);
        machine.set_driver_version(driver_version);
        machine.set_devices(devices);
        machine.set_init_code(init_code);
        machine.set_capability(major, minor);
        // Violations are asserted, not printed.
        machine.set_print(false);
    }

    /// The `nth` call from now returns `code`.
    pub fn fail(&self, nth: u64, fault: Fault, code: u32) {
        self.machine.fail(nth, fault, code);
    }

    /// The same of calls of `name`.
    pub fn fail_call(&self, name: &str, nth: u64, fault: Fault, code: u32) {
        self.machine.fail_call(name, nth, fault, code);
    }

    /// The next record of an event never completes, until `release`.
    pub fn hang(&self) {
        self.machine.hang(1);
    }

    /// This process is stopped for so long, at the end of the next call of
    /// `name`, while the device goes on.
    pub fn stop(&self, name: &str, milliseconds: u64) {
        self.machine.command(&format!("stop={name}:1:{milliseconds}"));
    }

    pub fn release(&self) {
        self.machine.release();
    }

    pub fn clear_faults(&self) {
        self.machine.clear_faults();
    }

    pub fn calls_of(&self, name: &str) -> u64 {
        self.machine.calls_of(name)
    }

    pub fn open(&self) -> Result<Device, CudaError> {
        Device::open(0, &DeviceOptions { modules: Modules::Named })
    }

    /// As the stand-in counts.
    pub fn count(&self, what: &str) -> u64 {
        self.machine.count(what)
    }

    /// Calls of the driver since the last reset.
    pub fn calls(&self) -> u64 {
        self.machine.calls()
    }

    pub fn alive(&self) -> Alive {
        let count = |what| self.machine.count(what);
        Alive {
            device_blocks: count("device_blocks"),
            pinned_blocks: count("pinned_blocks"),
            streams: count("streams"),
            events: count("events"),
            modules: count("modules"),
            contexts: count("contexts"),
        }
    }

    /// No copy or kernel did what it may not.
    pub fn assert_no_violation(&self) {
        assert_eq!(self.machine.violations(), Vec::<String>::new());
    }

    /// [`World::assert_no_violation`], and everything was destroyed.
    pub fn assert_nothing_alive(&self) {
        self.assert_no_violation();
        let alive = self.alive();
        assert_eq!(alive.sum(), 0, "{alive:?}");
    }
}

/// Bytes that differ with seed and place.
pub fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut random = Random::new(seed);
    let words = (0..bytes.div_ceil(8)).flat_map(|_| random.bits().to_le_bytes());
    // Never the byte that fresh memory has in `Store`.
    words.map(|byte| byte | 1).take(bytes).collect()
}
