//! The machines that these tests run on: the stand-in driver, whose settings
//! a test chooses, or any device. One test at a time, since a driver is one
//! for the whole process.

use pregate_kernels::cuda::{CudaError, Device, DeviceOptions, Modules};
use pregate_kernels::testing::Random;
use std::sync::{Mutex, MutexGuard, PoisonError};

static TURN: Mutex<()> = Mutex::new(());

pub type Turn = MutexGuard<'static, ()>;

fn turn() -> Turn {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// When work on a stream is done.
#[derive(Clone, Copy, Debug)]
pub enum Drain {
    /// When somebody waits for it.
    Lazy,
    /// At once.
    Eager,
    /// At any time between.
    Random(u64),
}

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
    let drains =
        [Drain::Lazy, Drain::Eager, Drain::Random(1), Drain::Random(2), Drain::Random(3)];
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
    _turn: Turn,
}

/// The stand-in with these settings and nothing in it; `None` where tests run
/// on a GPU or there is no stand-in.
pub fn standin(settings: Settings) -> Option<World> {
    let turn = turn();
    if !pregate_standin::is_loaded() {
        println!("not run: needs the stand-in driver");
        return None;
    }
    let world = World { _turn: turn };
    world.reset(settings);
    Some(world)
}

/// The stand-in or a GPU.
pub fn any_device() -> Option<(Turn, Device)> {
    let turn = turn();
    if pregate_standin::is_loaded() {
        World::set(Settings::default());
    }
    let device = pregate_standin::testing::device()?;
    Some((turn, device))
}

impl World {
    fn set(settings: Settings) {
        let Settings { drain, vram_bytes, pinned_bytes, driver_version, devices, init_code, .. } =
            settings;
        let (major, minor) = settings.capability;
        let drain = match drain {
            Drain::Lazy => "lazy".to_string(),
            Drain::Eager => "eager".to_string(),
            Drain::Random(seed) => format!("random:{seed}"),
        };
        for line in [
            "reset".to_string(),
            format!("drain={drain}"),
            format!("vram={vram_bytes}"),
            format!("pinned={pinned_bytes}"),
            format!("driver={driver_version}"),
            format!("devices={devices}"),
            format!("init={init_code}"),
            format!("capability={major}.{minor}"),
            // Violations are asserted, not printed.
            "print=0".to_string(),
        ] {
            pregate_standin::control(&line);
        }
    }

    /// Everything as new, with these settings.
    pub fn reset(&self, settings: Settings) {
        Self::set(settings);
    }

    pub fn command(&self, line: &str) {
        pregate_standin::control(line);
    }

    pub fn count(&self, what: &str) -> u64 {
        pregate_standin::count(what)
    }

    pub fn open(&self) -> Result<Device, CudaError> {
        Device::open(0, &DeviceOptions { modules: Modules::Named })
    }

    /// Calls of the driver since the last reset.
    pub fn calls(&self) -> u64 {
        self.count("calls")
    }

    pub fn alive(&self) -> Alive {
        Alive {
            device_blocks: self.count("device_blocks"),
            pinned_blocks: self.count("pinned_blocks"),
            streams: self.count("streams"),
            events: self.count("events"),
            modules: self.count("modules"),
            contexts: self.count("contexts"),
        }
    }

    /// No copy or kernel did what it may not.
    pub fn assert_no_violation(&self) {
        assert_eq!(pregate_standin::violations(), Vec::<String>::new());
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
