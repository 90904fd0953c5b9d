//! Occupancy by arithmetic, and how much of the memory's bandwidth a launch
//! can use.

/// What a multiprocessor of an architecture has. Source: CUDA C++ Programming
/// Guide, "Compute Capabilities", tables of technical specifications.
#[derive(Clone, Copy, Debug)]
pub struct Multiprocessor {
    pub warps: u32,
    pub blocks: u32,
    pub registers: u32,
    pub shared_bytes: u32,
    /// Of each block, for the system.
    pub shared_reserved: u32,
    pub shared_unit: u32,
}

const WARP: u32 = 32;
/// Registers are given to warps in these units, and to four warps at a time.
const REGISTER_UNIT: u32 = 256;
const WARP_UNIT: u32 = 4;

impl Multiprocessor {
    /// `None`: no such architecture in this table.
    pub fn of(sm: u32) -> Option<Self> {
        let (warps, blocks, shared_kib) = match sm {
            75 => (32, 16, 64),
            80 => (64, 32, 164),
            86 => (48, 16, 100),
            89 => (48, 24, 100),
            90 => (64, 32, 228),
            120 => (48, 24, 100),
            _ => return None,
        };
        let (shared_reserved, shared_unit) = if sm < 80 { (0, 256) } else { (1024, 128) };
        let shared_bytes = shared_kib << 10;
        Some(Self { warps, blocks, registers: 65536, shared_bytes, shared_reserved, shared_unit })
    }

    /// Blocks that are resident at once; 0: such a block does not fit at all.
    pub fn resident(self, threads: u32, registers: u32, shared_bytes: u32) -> u32 {
        let warps = threads.div_ceil(WARP).max(1);
        let by_warps = self.warps / warps;
        let per_warp = (registers.max(1) * WARP).next_multiple_of(REGISTER_UNIT);
        let by_registers = self.registers / per_warp / WARP_UNIT * WARP_UNIT / warps;
        let shared = (shared_bytes + self.shared_reserved).next_multiple_of(self.shared_unit);
        let by_shared = self.shared_bytes.checked_div(shared).unwrap_or(u32::MAX);
        by_warps.min(by_registers).min(by_shared).min(self.blocks)
    }
}

/// A card as its maker sells it; one for each architecture.
#[derive(Clone, Copy, Debug)]
pub struct Card {
    pub name: &'static str,
    pub sm: u32,
    pub multiprocessors: u32,
    /// Of its memory, as specified.
    pub gb_s: f64,
}

pub const CARDS: [Card; 6] = [
    Card { name: "RTX 2080 Ti", sm: 75, multiprocessors: 68, gb_s: 616.0 },
    Card { name: "A100 40 GB", sm: 80, multiprocessors: 108, gb_s: 1555.0 },
    Card { name: "RTX 3090", sm: 86, multiprocessors: 82, gb_s: 936.0 },
    Card { name: "RTX 4090", sm: 89, multiprocessors: 128, gb_s: 1008.0 },
    Card { name: "H100 SXM", sm: 90, multiprocessors: 132, gb_s: 3350.0 },
    Card { name: "RTX 5090", sm: 120, multiprocessors: 170, gb_s: 1792.0 },
];

/// Memory answers after so long when it is busy. An assumption: idle, the
/// cards were measured at 400 to 700 ns by others.
pub const LATENCY_S: f64 = 800e-9;
/// What refreshes and turns of the memory's bus leave of its specified rate:
/// 918 to 924 of 1008 GB/s were measured by others on an RTX 4090.
pub const REACHABLE: f64 = 0.92;
/// From one launch's end to full speed of the next one's loads: the blocks'
/// start and one latency. An assumption.
pub const RAMP_S: f64 = 1.5e-6;

/// What a launch asks for.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    pub blocks: u64,
    pub threads: u32,
    pub registers: u32,
    /// Static and dynamic.
    pub shared_bytes: u32,
    /// Bytes that one thread has asked for and not got, on its way.
    pub in_flight: u32,
    /// What it must move.
    pub bytes: u64,
}

/// Seconds, and the share of the specified bandwidth that is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Predicted {
    pub seconds: f64,
    pub share: f64,
}

impl Card {
    /// Little's law: the memory is busy while `latency * bandwidth` bytes are
    /// asked for; with less, it is so much less busy. Then the ramp is added.
    pub fn predict(self, launch: Launch) -> Option<Predicted> {
        let sm = Multiprocessor::of(self.sm)?;
        let resident = sm.resident(launch.threads, launch.registers, launch.shared_bytes);
        if resident == 0 {
            return None;
        }
        let at_once = launch.blocks.min(u64::from(resident) * u64::from(self.multiprocessors));
        let asked = at_once as f64 * f64::from(launch.threads) * f64::from(launch.in_flight);
        let rate = self.gb_s * 1e9;
        let needed = LATENCY_S * rate * REACHABLE;
        let steady = rate * REACHABLE * (asked / needed).min(1.0);
        let seconds = launch.bytes as f64 / steady + RAMP_S;
        Some(Predicted { seconds, share: launch.bytes as f64 / seconds / rate })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn occupancy_is_that_of_the_programming_guide() {
        // Threads, registers, shared bytes; blocks on 75, 80, 86, 89, 90, 120.
        for (launch, blocks) in [
            ((256, 32, 0), [4, 8, 6, 6, 8, 6]),
            // 40 registers: 51 warps' worth, in fours 48.
            ((128, 40, 0), [8, 12, 12, 12, 12, 12]),
            // Three warps a block: 16 blocks of the 48, where 51 would hold 17.
            ((96, 40, 0), [10, 16, 16, 16, 16, 16]),
            // 33 registers are given as 40, since 8 is the unit.
            ((1024, 33, 0), [1, 1, 1, 1, 1, 1]),
            // A kilobyte of each block is the system's since sm_80.
            ((32, 16, 31 << 10), [2, 5, 3, 3, 7, 3]),
            ((32, 16, 0), [16, 32, 16, 24, 32, 24]),
            ((1024, 255, 0), [0; 6]),
            ((32, 16, 100 << 10), [0, 1, 0, 0, 2, 0]),
        ] {
            let (threads, registers, shared) = launch;
            let found = CARDS.map(|card| {
                Multiprocessor::of(card.sm).unwrap().resident(threads, registers, shared)
            });
            assert_eq!(found, blocks, "{launch:?}");
        }
        assert!(Multiprocessor::of(70).is_none());
    }

    #[test]
    fn little_s_law_and_the_ramp_bound_the_share() {
        let card = CARDS[3];
        let launch = Launch {
            blocks: 1 << 20,
            threads: 256,
            registers: 32,
            shared_bytes: 0,
            in_flight: 16,
            bytes: 1 << 34,
        };
        let share = |launch| card.predict(launch).unwrap().share;
        assert!((share(launch) - REACHABLE).abs() < 1e-3, "enough in flight: what is reachable");
        // One block of 256 threads with 16 bytes each, of 741,888 needed.
        let little = share(Launch { blocks: 1, ..launch });
        let expected = 256.0 * 16.0 / (LATENCY_S * card.gb_s * 1e9);
        assert!((little / expected - 1.0).abs() < 1e-3, "{little} for {expected}");
        // As long as the ramp: half of what is reachable.
        let bytes = (card.gb_s * 1e9 * REACHABLE * RAMP_S) as u64;
        assert!((share(Launch { bytes, ..launch }) / REACHABLE - 0.5).abs() < 1e-3);
        assert_eq!(card.predict(Launch { shared_bytes: 1 << 20, ..launch }), None);
    }
}
