//! Why a layer's misses were shared as they were, in words for `--stats`.

use super::Class;
use super::way::{CPU, Candidate, DISASTER, Pick};
use std::fmt;

/// What one expert takes of either worker, in ns.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Prices {
    pub copy_ns: f64,
    pub cpu_ns: f64,
    /// Misses that a copy saves later, less those that it brings because
    /// another expert leaves.
    pub saves: f64,
}

/// Why.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub enum Reason {
    /// Nothing was missing, or the layer has no experts.
    #[default]
    Nothing,
    AllCpu(Prices),
    AllLink(Prices),
    /// The copies under way land before anybody else could help.
    AllWait(Prices),
    /// The workers end at about the same time.
    Shared {
        prices: Prices,
        cpu: usize,
        link: usize,
    },
    /// One worker is at least four times slower, and was left for that.
    Left {
        prices: Prices,
        cpu_is_slow: bool,
    },
    /// A first measurement.
    Trial {
        of_cpu: bool,
    },
    /// May be better than the best, and is not known as well.
    Exploring(Prices),
    /// Not used for long.
    Retry {
        of_cpu: bool,
    },
}

impl fmt::Display for Prices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (copy, cpu) = (self.copy_ns / 1e6, self.cpu_ns / 1e6);
        write!(f, "link: {copy:.2} ms a copy, CPU: {cpu:.2} ms an expert")?;
        match self.saves {
            saves if saves >= 0.05 => write!(f, ", a copy saves {saves:.1} misses later"),
            saves if saves <= -0.05 => write!(f, ", a copy costs {:.1} misses later", -saves),
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |of_cpu: &bool| if *of_cpu { "the CPU" } else { "the link" };
        match self {
            Self::Nothing => write!(f, "nothing was missing"),
            Self::AllCpu(prices) => write!(f, "{prices}: all on the CPU"),
            Self::AllLink(prices) => write!(f, "{prices}: all over the link"),
            Self::AllWait(prices) => write!(f, "{prices}: the copies under way come first"),
            Self::Shared { prices, cpu, link } => {
                write!(f, "{prices}: {cpu} on the CPU while the link brings {link}")
            }
            Self::Left { prices, cpu_is_slow } => {
                let times = prices.cpu_ns / prices.copy_ns.max(1.0);
                let times = if *cpu_is_slow { times } else { 1.0 / times.max(1e-9) };
                let name = name(cpu_is_slow);
                write!(f, "{prices}: without {name}, which is {times:.0} times slower")
            }
            Self::Trial { of_cpu } => write!(f, "a first measurement of {}", name(of_cpu)),
            Self::Exploring(prices) => write!(f, "{prices}: another share is being tried"),
            Self::Retry { of_cpu } => {
                write!(f, "{} was not used for long and is measured again", name(of_cpu))
            }
        }
    }
}

/// The reason of a choice in layer `at` of the class.
pub fn of(class: &Class, at: usize, chosen: &Candidate, pick: Pick) -> Reason {
    let prices = Prices { saves: chosen.saves, ..prices(class, at) };
    let (cpu, copies, waits) = (chosen.way.cpu, chosen.way.copies, chosen.way.waits);
    let slow_cpu = prices.cpu_ns >= DISASTER * prices.copy_ns;
    let slow_link = prices.copy_ns >= DISASTER * prices.cpu_ns;
    match pick {
        Pick::Trial(worker) => Reason::Trial { of_cpu: worker == CPU },
        Pick::Retry(worker) => Reason::Retry { of_cpu: worker == CPU },
        Pick::Explore => Reason::Exploring(prices),
        Pick::Best if cpu == 0 && copies == 0 => Reason::AllWait(prices),
        Pick::Best if cpu == 0 && slow_cpu || copies + waits == 0 && slow_link => {
            Reason::Left { prices, cpu_is_slow: slow_cpu }
        }
        Pick::Best if cpu == 0 => Reason::AllLink(prices),
        Pick::Best if copies + waits == 0 => Reason::AllCpu(prices),
        Pick::Best => Reason::Shared { prices, cpu, link: copies + waits },
    }
}

/// One expert of layer `at` of the class, nothing beside it.
pub fn prices(class: &Class, at: usize) -> Prices {
    Prices { copy_ns: class.link.alone(at, 1), cpu_ns: class.cpu.alone(at, 1), saves: 0.0 }
}
