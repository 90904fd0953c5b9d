//! Where experts are, as the device knows it: an entry per expert of the
//! model, in device memory.
//!
//! An expert that arrives is published by the copy that brings it, behind its
//! last byte. One that leaves is taken out by the next token's first launch;
//! until then its layer is not computed again (`store::PassInfo::keeps_ahead`).
//! An entry whose removal waits is set by the same launch.

use super::upload::Uploader;
use pregate_kernels::cuda::{CudaError, ENTRY_BYTES, ExpertArena, Span};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The entries of all experts.
pub struct SlotTable {
    /// u32 `[experts of the model]`, by layer.
    slot_of: Span,
    /// What entries are relative to.
    arena: Span,
    /// Per layer of the model: its entries.
    layers: Vec<Range<usize>>,
    /// New entries that the next token's first launch sets.
    waiting: Mutex<BTreeMap<u32, u32>>,
}

impl SlotTable {
    /// `address` answers for an expert that never leaves, else 0.
    pub fn upload(
        up: &mut Uploader<'_>,
        experts: &[usize],
        address: impl Fn(usize, usize) -> u64,
    ) -> Result<Self, CudaError> {
        let arena = up.experts().clone();
        let mut end = 0;
        let layers: Vec<Range<usize>> = (experts.iter())
            .map(|count| {
                let start = end;
                end += count;
                start..end
            })
            .collect();
        let entry = |(layer, expert)| match address(layer, expert) {
            0 => 0,
            address => entry_at((address - arena.address()) as usize),
        };
        let all = experts.iter().enumerate();
        let all = all.flat_map(|(layer, &count)| (0..count).map(move |expert| (layer, expert)));
        let entries: Vec<u8> = all.map(entry).flat_map(u32::to_ne_bytes).collect();
        let slot_of = up.bytes(if entries.is_empty() { &[0; 4] } else { &entries })?;
        Ok(Self { slot_of, arena, layers, waiting: Mutex::default() })
    }

    /// Bytes of [`SlotTable::upload`] for so many experts.
    pub fn bytes(experts: usize) -> usize {
        4 * experts.max(1)
    }

    /// u32 `[experts of the model]`
    pub fn all(&self) -> &Span {
        &self.slot_of
    }

    /// u32 `[experts]` of a layer.
    pub fn of_layer(&self, layer: usize) -> Span {
        let Range { start, end } = self.layers[layer];
        self.slot_of.part(4 * start..4 * end)
    }

    pub fn arena(&self, block_bytes: usize) -> ExpertArena<'_> {
        ExpertArena { span: &self.arena, block_bytes }
    }

    /// What a block of the arena is called.
    pub fn entry(&self, block: &Span) -> u32 {
        entry_at((block.address() - self.arena.address()) as usize)
    }

    /// Where the copy of an expert says that it is there; `None`: an update of
    /// its entry waits, so that this must wait as well ([`SlotTable::set`]).
    pub fn publish(&self, layer: usize, expert: usize) -> Option<Span> {
        let index = self.index(layer, expert);
        let is_free = !self.waiting().contains_key(&(index as u32));
        is_free.then(|| self.slot_of.part(4 * index..4 * index + 4))
    }

    /// The next token finds an expert under another entry, 0: nowhere.
    pub fn set(&self, layer: usize, expert: usize, entry: u32) {
        self.waiting().insert(self.index(layer, expert) as u32, entry);
    }

    /// Puts the entries that wait into `entries`, for a first launch.
    pub fn take(&self, entries: &mut Vec<(u32, u32)>) {
        let mut waiting = self.waiting();
        entries.clear();
        entries.extend(waiting.iter().map(|(&index, &entry)| (index, entry)));
        waiting.clear();
    }

    /// Entries that were taken, and no launch has set.
    pub fn put_back(&self, entries: &[(u32, u32)]) {
        let mut waiting = self.waiting();
        for &(index, entry) in entries {
            waiting.entry(index).or_insert(entry);
        }
    }

    fn index(&self, layer: usize, expert: usize) -> usize {
        self.layers[layer].start + expert
    }

    fn waiting(&self) -> MutexGuard<'_, BTreeMap<u32, u32>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Blocks start at multiples of 256 bytes, of at most 1 TiB.
fn entry_at(offset: usize) -> u32 {
    debug_assert!(offset.is_multiple_of(ENTRY_BYTES));
    ExpertArena::entry(offset).expect("blocks are aligned, and GPUs smaller than a terabyte")
}

#[cfg(test)]
mod tests {
    use super::*;
    use pregate_kernels::cuda::{Device, DeviceOptions, Modules};
    use pregate_standin::{Exclusive, testing};

    /// Entries of layers with 4 and 3 experts, none of which is there.
    fn table() -> Option<(Exclusive<'static>, SlotTable)> {
        let turn = testing::standin()?.exclusive();
        let device = Device::open(0, &DeviceOptions { modules: Modules::Named }).unwrap();
        let arena = device.arena(4096).unwrap();
        let slot_of = arena.take(SlotTable::bytes(7), 4).unwrap();
        let arena = arena.take(2048, ENTRY_BYTES).unwrap();
        let layers = vec![0..4, 4..7];
        Some((turn, SlotTable { slot_of, arena, layers, waiting: Mutex::default() }))
    }

    fn taken(slots: &SlotTable) -> Vec<(u32, u32)> {
        let mut entries = Vec::new();
        slots.take(&mut entries);
        entries
    }

    /// Published beside it, a first launch would take it out again.
    #[test]
    fn an_entry_whose_update_waits_is_not_published() {
        let Some((_turn, slots)) = table() else { return };
        let address = slots.slot_of.address();
        assert_eq!(slots.publish(1, 2).unwrap().address(), address + 4 * 6);
        slots.set(1, 2, 0);
        assert!(slots.publish(1, 2).is_none());
        assert_eq!(slots.publish(0, 2).unwrap().address(), address + 4 * 2);
        assert_eq!(slots.publish(1, 1).unwrap().bytes(), 4);
        assert_eq!(taken(&slots), [(6, 0)]);
        assert_eq!(slots.publish(1, 2).unwrap().address(), address + 4 * 6);
    }

    #[test]
    fn what_no_launch_has_set_waits_again_behind_what_came_later() {
        let Some((_turn, slots)) = table() else { return };
        slots.set(0, 1, 0);
        slots.set(0, 3, 0);
        let mut entries = vec![(9, 9)];
        slots.take(&mut entries);
        assert_eq!(entries, [(1, 0), (3, 0)]);
        assert!(taken(&slots).is_empty());
        slots.set(0, 1, 5);
        slots.put_back(&entries);
        assert_eq!(taken(&slots), [(1, 5), (3, 0)]);
    }
}
