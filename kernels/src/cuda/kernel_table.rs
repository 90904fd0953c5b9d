//! Kernels by their names, found without a lock and without a new string:
//! launchers ask at every launch, more than a thousand times a token.

use super::module::Kernel;
use std::sync::OnceLock;

/// More than all kernels of `kernels/cuda`, so that probes are short. Those
/// for which there is no room are looked up behind the lock.
const SLOTS: usize = 1024;
/// Slots that are looked at for a name.
const PROBES: usize = 16;

/// What launchers have asked for; grows only.
pub(super) struct KernelTable(Box<[OnceLock<Kernel>]>);

/// A kernel's module and the pieces that its name consists of.
#[derive(Clone, Copy)]
pub(super) struct KernelName<'a> {
    pub module: &'a str,
    pub pieces: &'a [&'a str],
}

impl KernelName<'_> {
    /// FNV-1a of the module and the name.
    fn hash(&self) -> u64 {
        let pieces = self.pieces.iter().flat_map(|piece| piece.bytes());
        let bytes = self.module.bytes().chain([0]).chain(pieces);
        bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
    }

    /// Whether the pieces are `name`.
    fn is(&self, module: &str, name: &str) -> bool {
        let rest = self.pieces.iter().try_fold(name, |rest, piece| rest.strip_prefix(piece));
        module == self.module && rest == Some("")
    }
}

impl KernelTable {
    pub fn new() -> Self {
        Self((0..SLOTS).map(|_| OnceLock::new()).collect())
    }

    pub fn find(&self, name: KernelName<'_>) -> Option<&Kernel> {
        let kernels = self.slots(name).map_while(OnceLock::get);
        kernels.into_iter().find(|kernel| name.is(kernel.module_name(), kernel.name()))
    }

    /// Leaves it out when there is no room.
    pub fn keep(&self, name: KernelName<'_>, kernel: &Kernel) {
        for slot in self.slots(name) {
            let kept = slot.get_or_init(|| kernel.clone());
            if name.is(kept.module_name(), kept.name()) {
                return;
            }
        }
    }

    /// Where it may be, the first first.
    fn slots(&self, name: KernelName<'_>) -> impl Iterator<Item = &OnceLock<Kernel>> {
        let first = name.hash() as usize;
        (0..PROBES).map(move |probe| &self.0[first.wrapping_add(probe) % SLOTS])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_other_pieces_are_the_same_name() {
        let name = |module, pieces| KernelName { module, pieces };
        let whole = name("dense", &["gemv_q4_k_many"]);
        let cut = name("dense", &["gemv_", "q4_k", "_many"]);
        assert_eq!(whole.hash(), cut.hash());
        for name in [whole, cut] {
            assert!(name.is("dense", "gemv_q4_k_many"));
            for other in ["gemv_q4_k", "gemv_q4_k_many_more", "", "gemv_q4_k_mani"] {
                assert!(!name.is("dense", other), "{other}");
            }
            assert!(!name.is("experts", "gemv_q4_k_many"));
        }
        // The border between module and name is part of the key.
        assert_ne!(name("a", &["bc"]).hash(), name("ab", &["c"]).hash());
    }
}
