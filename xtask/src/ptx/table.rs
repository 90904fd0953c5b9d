//! `kernels/ptx/ptxas.toml`: what each kernel takes on each architecture.

use super::ptxas::{Bounds, Report};
use serde::Deserialize;
use std::{collections::BTreeMap, fmt::Write};

/// An architecture that ptxas assembles for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    pub sm: u32,
    /// The virtual architecture that its PTX is of.
    pub ptx: u32,
}

impl Target {
    pub fn name(self) -> String {
        format!("sm_{}", self.sm)
    }
}

const fn target(sm: u32) -> Target {
    Target { sm, ptx: if sm < 80 { 75 } else { 80 } }
}

/// Turing, Ampere (A100, then GeForce), Ada, Hopper, Blackwell (GeForce).
pub const TARGETS: [Target; 6] =
    [target(75), target(80), target(86), target(89), target(90), target(120)];

type PerTarget = [u32; TARGETS.len()];

/// What one kernel takes, by [`TARGETS`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// The most threads of a block; `None` without launch bounds.
    #[serde(default)]
    pub threads: Option<u32>,
    /// Blocks per multiprocessor that the launch bounds ask for.
    #[serde(default)]
    pub blocks: Option<u32>,
    /// Per thread.
    pub registers: PerTarget,
    /// Static bytes per block.
    #[serde(default)]
    pub shared: PerTarget,
    /// Local bytes per thread.
    #[serde(default)]
    pub stack: PerTarget,
    /// Bytes of spill stores and loads; not in the file, where there are none.
    #[serde(skip)]
    pub spills: PerTarget,
}

/// Kernels by file and name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table(BTreeMap<String, BTreeMap<String, Kernel>>);

const HEAD: &str = "\
# What each kernel takes of a multiprocessor, as ptxas 12.9.86 says: written by
# `cargo xtask ptx`, compared by `cargo xtask ptx --check`. Registers per
# thread, static shared bytes per block, stack bytes per thread on
# sm_75, sm_80, sm_86, sm_89, sm_90 and sm_120. No kernel may spill.
";

impl Table {
    /// Errors, in words: it is no table of ours.
    pub fn parse(text: &str) -> Result<Self, String> {
        toml::from_str(text).map(Self).map_err(|error| format!("{}: {error}", super::TABLE))
    }

    pub fn text(&self) -> String {
        let mut out = HEAD.to_string();
        for (file, kernels) in &self.0 {
            let _ = writeln!(out, "\n[{file}]");
            for (name, kernel) in kernels {
                let mut fields = Vec::new();
                fields.extend(kernel.threads.map(|threads| format!("threads = {threads}")));
                fields.extend(kernel.blocks.map(|blocks| format!("blocks = {blocks}")));
                fields.push(format!("registers = {:?}", kernel.registers));
                for (name, numbers) in [("shared", kernel.shared), ("stack", kernel.stack)] {
                    if numbers != [0; TARGETS.len()] {
                        fields.push(format!("{name} = {numbers:?}"));
                    }
                }
                let _ = writeln!(out, "{name} = {{ {} }}", fields.join(", "));
            }
        }
        out
    }

    pub fn add(&mut self, file: &str, target: Target, report: &Report) {
        let kernels = self.0.entry(file.to_string()).or_default();
        let kernel = kernels.entry(report.name.clone()).or_default();
        let at = TARGETS.iter().position(|known| *known == target).expect("one of TARGETS");
        kernel.registers[at] = report.registers;
        kernel.shared[at] = report.shared_bytes;
        kernel.stack[at] = report.stack_bytes;
        kernel.spills[at] = report.spill_bytes;
    }

    /// Adds the launch bounds of a file's kernels.
    pub fn add_bounds(&mut self, file: &str, bounds: &BTreeMap<String, Bounds>) {
        for (name, kernel) in self.0.get_mut(file).into_iter().flatten() {
            if let Some(&(threads, blocks)) = bounds.get(name) {
                (kernel.threads, kernel.blocks) = (Some(threads), blocks);
            }
        }
    }

    /// File, name and kernel, in order.
    pub fn kernels(&self) -> impl Iterator<Item = (&str, &str, &Kernel)> {
        self.0.iter().flat_map(|(file, kernels)| {
            kernels.iter().map(move |(name, kernel)| (file.as_str(), name.as_str(), kernel))
        })
    }

    /// One line per kernel that spills.
    pub fn spills(&self) -> Vec<String> {
        let spilled = self.kernels().filter(|(_, _, kernel)| kernel.spills.iter().any(|&n| n > 0));
        spilled
            .map(|(file, name, kernel)| {
                let on = TARGETS.iter().zip(kernel.spills).filter(|(_, bytes)| *bytes > 0);
                let on = on.map(|(target, bytes)| format!("{bytes} bytes on {}", target.name()));
                let on = on.collect::<Vec<_>>().join(", ");
                format!("{file}/{name} spills registers: {on}; no kernel may")
            })
            .collect()
    }

    /// What of this table is not as in `old`, one line per kernel and figure.
    pub fn differences(&self, old: &Table) -> Vec<String> {
        let mut found = Vec::new();
        let get =
            |table: &Table, file: &str, name: &str| Some(table.0.get(file)?.get(name)?.clone());
        for (file, name, new) in self.kernels() {
            let Some(old) = get(old, file, name) else {
                found.push(format!("{file}/{name} is new"));
                continue;
            };
            let figures = [
                ("registers", old.registers, new.registers),
                ("shared bytes", old.shared, new.shared),
                ("stack bytes", old.stack, new.stack),
            ];
            for (what, old, new) in figures {
                let changed = |at: &usize| old[*at] != new[*at];
                let told = (0..TARGETS.len())
                    .filter(changed)
                    .map(|at| format!("{} on {} (was {})", new[at], TARGETS[at].name(), old[at]));
                let told: Vec<String> = told.collect();
                if !told.is_empty() {
                    let more = new.iter().zip(old).any(|(new, old)| *new > old);
                    let word = if more { "more" } else { "fewer" };
                    found.push(format!("{file}/{name} takes {word} {what}: {}", told.join(", ")));
                }
            }
            if (old.threads, old.blocks) != (new.threads, new.blocks) {
                found.push(format!("{file}/{name} has other launch bounds"));
            }
        }
        let gone = old.kernels().filter(|(file, name, _)| get(self, file, name).is_none());
        found.extend(gone.map(|(file, name, _)| format!("{file}/{name} is gone")));
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(kernels: &[(&str, u32, u32)]) -> Table {
        let mut table = Table::default();
        for &(name, registers, spill_bytes) in kernels {
            for (target, more) in TARGETS.into_iter().zip(0..) {
                let report = Report {
                    name: name.to_string(),
                    registers: registers + more,
                    shared_bytes: 1024,
                    stack_bytes: 0,
                    spill_bytes: if target.sm == 90 { spill_bytes } else { 0 },
                };
                table.add("dense", target, &report);
            }
        }
        table.add_bounds("dense", &BTreeMap::from([("a".to_string(), (128, Some(4)))]));
        table
    }

    #[test]
    fn the_file_says_what_the_table_says() {
        let table = table(&[("a", 32, 0), ("b", 40, 0)]);
        assert_eq!(Table::parse(&table.text()).unwrap(), table);
        assert!(
            table.text().contains("\n[dense]\na = { threads = 128, blocks = 4, registers = [32, ")
        );
        assert!(Table::parse("[dense]\na = { registers = [1, 2] }").is_err());
        assert!(Table::parse("[dense]\na = { spills = 1 }").is_err());
    }

    #[test]
    fn spills_and_changes_are_told() {
        let old = table(&[("a", 32, 0), ("b", 40, 0), ("c", 1, 0)]);
        let new = table(&[("a", 33, 4), ("b", 39, 0), ("d", 1, 0)]);
        assert_eq!(old.spills(), [""; 0]);
        let spills = new.spills().join("\n");
        assert!(spills.contains("dense/a spills registers: 4 bytes on sm_90;"), "{spills}");
        let found = new.differences(&old).join("\n");
        for words in [
            "dense/a takes more registers: 33 on sm_75 (was 32), 34 on sm_80",
            "dense/b takes fewer registers",
            "dense/d is new",
            "dense/c is gone",
        ] {
            assert!(found.contains(words), "{words}: {found}");
        }
        assert_eq!(old.differences(&old), [""; 0]);
    }
}
