//! The link: order, exactly one answer to each transfer, every byte in place.

use crate::world::{Drain, Fault, Settings, any_device, drains, pattern, standin};
use pregate_kernels::cuda::{
    CudaError, Device, Landed, Link, LinkError, LinkOptions, Part, Pinned, PinnedPart, Span,
    Transfer, Urgency,
};
use pregate_kernels::testing::Random;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

pub const CHUNK: usize = 4096;

pub fn options(thread: bool) -> LinkOptions {
    LinkOptions { chunk_bytes: CHUNK, thread, ..LinkOptions::default() }
}

pub struct Store {
    pub block: Arc<Pinned>,
    pub span: Span,
}

impl Store {
    pub fn new(device: &Device, bytes: usize) -> Self {
        let mut block = device.pinned(bytes).unwrap();
        block.copy_from_slice(&pattern(5, bytes));
        let span = device.arena(bytes).unwrap().take(bytes, 16).unwrap();
        device.compute().fill(&span, 0).unwrap();
        device.compute().synchronize().unwrap();
        Self { block: Arc::new(block), span }
    }

    /// A transfer of bytes `from` to `from + bytes` of the block to the same
    /// place of the span.
    pub fn transfer(
        &self,
        key: u64,
        from: usize,
        bytes: usize,
        urgency: Urgency,
    ) -> Transfer<PinnedPart> {
        Transfer {
            key,
            memory: PinnedPart::new(self.block.clone(), from..from + bytes).unwrap(),
            parts: vec![Part { from: 0..bytes, to: 0 }],
            destination: self.span.part(from..from + bytes),
            urgency,
            after: None,
            publish: None,
        }
    }

    pub fn contents(&self, device: &Device) -> Vec<u8> {
        let mut bytes = vec![0; self.span.bytes()];
        device.compute().download(&self.span, &mut bytes).unwrap();
        bytes
    }
}

fn collect(link: &mut Link<PinnedPart>) -> Vec<Landed<PinnedPart>> {
    std::iter::from_fn(|| link.next(u64::MAX)).collect()
}

#[test]
fn a_demand_overtakes_prefetches_at_the_border_of_a_chunk() {
    let Some(world) = standin(Settings { drain: Drain::Lazy, ..Settings::default() }) else {
        return;
    };
    let device = world.open().unwrap();
    let store = Store::new(&device, 64 * CHUNK);
    let mut link = Link::new(&device, &options(false)).unwrap();
    for key in 0..2 {
        let from = key as usize * 10 * CHUNK;
        link.submit(store.transfer(key, from, 10 * CHUNK, Urgency::Prefetch));
    }
    // Two chunks of prefetches are with the device; the third place is kept
    // for a demand.
    link.submit(store.transfer(7, 40 * CHUNK, 3 * CHUNK, Urgency::Demand));
    link.submit(store.transfer(8, 50 * CHUNK, CHUNK, Urgency::Demand));
    // Promoted: behind the demands, before the other prefetch.
    link.promote(1);
    let landed = collect(&mut link);
    let keys: Vec<u64> = landed.iter().map(|landed| landed.key).collect();
    assert_eq!(keys, [7, 8, 1, 0]);
    assert!(landed.iter().all(|landed| landed.result.is_ok()));
    // The demand's last chunk was at most two prefetch chunks later than it
    // would have been alone.
    let counters = link.counters();
    assert_eq!((counters.demands_landed, counters.prefetches_landed), (3, 1));
    assert_eq!(counters.chunks, 24);
    assert_eq!(counters.bytes, 24 * CHUNK as u64);
    assert_eq!((counters.wasted_bytes, counters.outstanding), (0, 0));
    let ended: Vec<u64> = landed.iter().map(|landed| landed.ended_ns).collect();
    assert!(ended.is_sorted());
}

#[test]
fn prefetches_leave_a_place_for_a_demand() {
    let Some(world) = standin(Settings { drain: Drain::Lazy, ..Settings::default() }) else {
        return;
    };
    let device = world.open().unwrap();
    let store = Store::new(&device, 64 * CHUNK);
    let mut link = Link::new(&device, &options(false)).unwrap();
    let before = world.calls_of("cuMemcpyHtoDAsync");
    link.submit(store.transfer(0, 0, 10 * CHUNK, Urgency::Prefetch));
    assert_eq!(world.calls_of("cuMemcpyHtoDAsync"), before + 2);
    let chunks = |count: usize| (count * CHUNK) as u64;
    assert_eq!((link.queued(), link.remaining(0)), (chunks(2), Some(chunks(10))));
    link.submit(store.transfer(1, 20 * CHUNK, 10 * CHUNK, Urgency::Demand));
    assert_eq!(world.calls_of("cuMemcpyHtoDAsync"), before + 3);
    // With the device are three; the rest of the prefetch is nobody's wait.
    assert_eq!((link.queued(), link.remaining(1)), (chunks(12), Some(chunks(12))));
    assert_eq!((link.remaining(0), link.remaining(9)), (Some(chunks(20)), None));
    assert_eq!(collect(&mut link).len(), 2);
    assert_eq!(link.queued(), 0);
    assert!(store.contents(&device)[..10 * CHUNK] == pattern(5, 64 * CHUNK)[..10 * CHUNK]);
}

#[test]
fn parts_are_cut_into_even_chunks_of_at_most_the_longest() {
    let Some(world) = standin(Settings::default()) else { return };
    let device = world.open().unwrap();
    let store = Store::new(&device, 1 << 20);
    let longest = 64 << 10;
    for (bytes, chunks) in [(1, 1), (longest, 1), (longest + 1, 2), (10 * longest - 5, 10)] {
        let options = LinkOptions { chunk_bytes: longest, ..options(false) };
        let mut link = Link::new(&device, &options).unwrap();
        link.submit(store.transfer(3, 77, bytes, Urgency::Demand));
        assert_eq!(collect(&mut link)[0].bytes, bytes as u64);
        assert_eq!(link.counters().chunks, chunks, "{bytes} bytes");
    }
    // Parts of an expert land where they were told to, and nothing else is
    // touched.
    let mut link = Link::new(&device, &options(false)).unwrap();
    device.compute().fill(&store.span, 0).unwrap();
    device.compute().synchronize().unwrap();
    let mut transfer = store.transfer(4, 0, 30_000, Urgency::Demand);
    transfer.parts = vec![
        Part { from: 10_000..20_001, to: 3 },
        Part { from: 5..10, to: 20_000 },
        Part { from: 29_000..30_000, to: 11_111 },
    ];
    link.submit(transfer);
    assert!(collect(&mut link)[0].result.is_ok());
    let (data, found) = (pattern(5, 1 << 20), store.contents(&device));
    let mut expected = vec![0; 1 << 20];
    expected[3..10_004].copy_from_slice(&data[10_000..20_001]);
    expected[20_000..20_005].copy_from_slice(&data[5..10]);
    expected[11_111..12_111].copy_from_slice(&data[29_000..30_000]);
    assert!(found == expected);
}

#[test]
fn a_transfer_waits_for_the_work_that_still_reads_its_destination() {
    for thread in [false, true] {
        let Some(world) = standin(Settings { drain: Drain::Lazy, ..Settings::default() }) else {
            return;
        };
        let device = world.open().unwrap();
        let store = Store::new(&device, 8 * CHUNK);
        let kept = device.arena(CHUNK).unwrap().take(CHUNK, 16).unwrap();
        let old = store.span.part(0..CHUNK);
        device.compute().upload(&old, &pattern(1, CHUNK)).unwrap();
        // A lazy stream has not read the old expert when the new one is
        // asked for.
        device.compute().copy(&old, &kept).unwrap();
        let mut link = Link::new(&device, &options(thread)).unwrap();
        let mut transfer = store.transfer(1, 0, CHUNK, Urgency::Demand);
        transfer.after = Some(device.compute().record().unwrap());
        link.submit(transfer);
        link.submit(store.transfer(2, CHUNK, CHUNK, Urgency::Prefetch));
        assert!(collect(&mut link).iter().all(|landed| landed.result.is_ok()));
        let mut bytes = vec![0; CHUNK];
        device.copy().download(&kept, &mut bytes).unwrap();
        assert!(bytes == pattern(1, CHUNK), "overwritten before it was read");
        assert!(store.contents(&device)[..CHUNK] == pattern(5, 8 * CHUNK)[..CHUNK]);
    }
}

#[test]
fn discarded_transfers_land_once_and_say_what_they_wasted() {
    let Some(world) = standin(Settings { drain: Drain::Lazy, ..Settings::default() }) else {
        return;
    };
    let device = world.open().unwrap();
    let store = Store::new(&device, 64 * CHUNK);
    let mut link = Link::new(&device, &options(false)).unwrap();
    link.submit(store.transfer(0, 0, 10 * CHUNK, Urgency::Prefetch));
    link.submit(store.transfer(1, 10 * CHUNK, 10 * CHUNK, Urgency::Prefetch));
    link.submit(store.transfer(2, 20 * CHUNK, CHUNK, Urgency::Demand));
    // One that waits, one that flies, one that is wholly with the device,
    // one that nobody knows.
    for key in [1, 0, 2, 99] {
        link.discard(key);
        link.discard(key);
    }
    let landed = collect(&mut link);
    let results: HashMap<u64, _> =
        landed.into_iter().map(|landed| (landed.key, (landed.result, landed.bytes))).collect();
    assert_eq!(results.len(), 3);
    assert_eq!(results[&1], (Err(LinkError::Discarded), 0));
    assert_eq!(results[&0], (Err(LinkError::Discarded), 2 * CHUNK as u64));
    assert_eq!(results[&2], (Ok(()), CHUNK as u64));
    let counters = link.counters();
    assert_eq!((counters.discarded, counters.demands_landed), (2, 1));
    assert_eq!(counters.wasted_bytes, 2 * CHUNK as u64);
    // Keys may be used again.
    link.submit(store.transfer(1, 0, CHUNK, Urgency::Demand));
    assert!(collect(&mut link)[0].result.is_ok());
}

#[test]
fn random_transfers_arrive_exactly_once_with_every_byte() {
    for (seed, settings) in (0..8).flat_map(|seed| drains().map(move |settings| (seed, settings))) {
        let Some(world) = standin(settings) else { return };
        let device = world.open().unwrap();
        let store = Store::new(&device, 600 * CHUNK);
        let mut random = Random::new(seed);
        let mut link = Link::new(&device, &options(seed % 2 == 0)).unwrap();
        let mut outstanding = HashMap::new();
        let (mut submitted, mut landed_count) = (0u64, 0u64);
        let mut expected = vec![0u8; 600 * CHUNK];
        let data = pattern(5, 600 * CHUNK);
        let mut check = |landed: Landed<PinnedPart>, outstanding: &mut HashMap<u64, _>| {
            let (from, bytes): (usize, usize) =
                outstanding.remove(&landed.key).expect("landed twice, or never submitted");
            landed_count += 1;
            assert!(landed.memory.is_some());
            match landed.result {
                Ok(()) => expected[from..from + bytes].copy_from_slice(&data[from..from + bytes]),
                Err(error) => assert_eq!(error, LinkError::Discarded),
            }
        };
        while submitted < 60 || !outstanding.is_empty() {
            match random.below(5) {
                0 | 1 if submitted < 60 => {
                    let from = submitted as usize * 10 * CHUNK;
                    let bytes = 1 + random.below(10 * CHUNK);
                    let urgency = random.pick(&[Urgency::Demand, Urgency::Prefetch]);
                    let mut transfer = store.transfer(submitted, from, bytes, urgency);
                    if random.below(4) == 0 {
                        transfer.after = Some(device.compute().record().unwrap());
                    }
                    link.submit(transfer);
                    outstanding.insert(submitted, (from, bytes));
                    submitted += 1;
                }
                2 => link.promote(random.below(60) as u64),
                3 if random.below(4) == 0 => link.discard(random.below(60) as u64),
                _ => {
                    let wait = random.pick(&[0, 1000, u64::MAX]);
                    if let Some(landed) = link.next(wait) {
                        check(landed, &mut outstanding);
                    }
                }
            }
        }
        assert!(link.next(u64::MAX).is_none());
        let counters = link.counters();
        assert_eq!((counters.transfers, landed_count), (60, 60));
        assert_eq!(counters.outstanding, 0);
        let ended = counters.demands_landed + counters.prefetches_landed + counters.discarded;
        assert_eq!((ended, counters.failed), (60, 0));
        // Discarded ones may have brought some of their bytes.
        let found = store.contents(&device);
        let wrong = (0..expected.len()).find(|&i| found[i] != expected[i] && found[i] != data[i]);
        assert_eq!(wrong, None);
        let missing = (0..expected.len()).find(|&i| expected[i] != 0 && found[i] != expected[i]);
        assert_eq!(missing, None);
        drop((link, store, device));
        world.assert_nothing_alive();
    }
}

#[test]
fn a_link_that_is_dropped_leaves_nothing_in_flight() {
    for settings in drains() {
        for thread in [false, true] {
            let Some(world) = standin(settings) else { return };
            let device = world.open().unwrap();
            let store = Store::new(&device, 64 * CHUNK);
            let mut link = Link::new(&device, &options(thread)).unwrap();
            for key in 0..6 {
                let from = key as usize * 10 * CHUNK;
                link.submit(store.transfer(key, from, 10 * CHUNK, Urgency::Prefetch));
            }
            drop(link);
            // The last owner of the block: freeing it while a copy reads it
            // would be reported.
            drop((store, device));
            world.assert_nothing_alive();
        }
    }
}

#[test]
fn an_error_of_one_transfer_is_not_an_error_of_others() {
    let Some(world) = standin(Settings { drain: Drain::Lazy, ..Settings::default() }) else {
        return;
    };
    let device = world.open().unwrap();
    let store = Store::new(&device, 64 * CHUNK);
    let mut link = Link::new(&device, &options(false)).unwrap();
    // Refused, asked again, refused again: a call that fails counts for one
    // of the two only.
    world.fail_call("cuMemcpyHtoDAsync", 3, Fault::Once, 1);
    world.fail_call("cuMemcpyHtoDAsync", 3, Fault::Once, 1);
    link.submit(store.transfer(0, 0, 10 * CHUNK, Urgency::Demand));
    link.submit(store.transfer(1, 10 * CHUNK, 10 * CHUNK, Urgency::Demand));
    let landed = collect(&mut link);
    assert_eq!(landed.len(), 2);
    for Landed { key, memory, result, bytes, .. } in landed {
        assert!(memory.is_some());
        match key {
            0 => {
                let api = |error: &LinkError| {
                    matches!(error, LinkError::Cuda(CudaError::Api { code: 1, .. }))
                };
                assert!(result.as_ref().is_err_and(api), "{result:?}");
                assert_eq!(bytes, 2 * CHUNK as u64);
            }
            _ => assert_eq!((result, bytes), (Ok(()), 10 * CHUNK as u64)),
        }
    }
    let counters = link.counters();
    assert_eq!((counters.failed, counters.retries, counters.demands_landed), (1, 1, 1));
    // Once is not an error.
    world.fail_call("cuMemcpyHtoDAsync", 2, Fault::Once, 2);
    link.submit(store.transfer(0, 0, 4 * CHUNK, Urgency::Demand));
    assert!(collect(&mut link)[0].result.is_ok());
    assert!(store.contents(&device)[..4 * CHUNK] == pattern(5, 64 * CHUNK)[..4 * CHUNK]);
}

#[test]
fn a_sticky_error_ends_every_transfer_and_refuses_new_ones() {
    for thread in [false, true] {
        let Some(world) = standin(Settings { drain: Drain::Lazy, ..Settings::default() }) else {
            return;
        };
        let device = world.open().unwrap();
        let store = Store::new(&device, 64 * CHUNK);
        let mut link = Link::new(&device, &options(thread)).unwrap();
        world.fail_call("cuMemcpyHtoDAsync", 5, Fault::Sticky, 700);
        for key in 0..6 {
            let from = key as usize * 10 * CHUNK;
            link.submit(store.transfer(key, from, 10 * CHUNK, Urgency::Demand));
        }
        let landed = collect(&mut link);
        assert_eq!(landed.len(), 6);
        for Landed { result, .. } in &landed {
            let error = result.clone().unwrap_err();
            assert!(matches!(error, LinkError::Cuda(CudaError::Sticky { code: 700, .. })));
        }
        // What never went to the device comes back; what did, does not.
        assert!(landed.iter().any(|landed| landed.memory.is_some()));
        assert!(landed.iter().any(|landed| landed.memory.is_none()));
        link.submit(store.transfer(9, 0, CHUNK, Urgency::Demand));
        let last = link.next(u64::MAX).unwrap();
        assert!(last.memory.is_some() && last.result.is_err());
        let calls = world.calls();
        drop((link, landed, last, store, device));
        assert_eq!(world.calls(), calls, "a call after the sticky error");
    }
}

#[test]
fn mistakes_of_the_caller_are_refused_at_once() {
    let Some((_turn, device)) = any_device() else { return };
    let store = Store::new(&device, 8 * CHUNK);
    let part = |from: std::ops::Range<usize>, to| Part { from, to };
    let wrong: [Vec<Part>; 6] = [
        vec![],
        vec![part(5..5, 0)],
        vec![part(0..CHUNK + 1, 0)],
        vec![part(0..10, CHUNK - 9)],
        vec![part(0..10, usize::MAX - 3)],
        vec![part(0..10, 0), part(20..30, 9)],
    ];
    for parts in wrong {
        let refused = catch_unwind(AssertUnwindSafe(|| {
            let mut link = Link::new(&device, &options(false)).unwrap();
            let transfer = store.transfer(1, 0, CHUNK, Urgency::Demand);
            link.submit(Transfer { parts: parts.clone(), ..transfer });
        }));
        assert!(refused.is_err(), "{parts:?}");
    }
    let twice = catch_unwind(AssertUnwindSafe(|| {
        let mut link = Link::new(&device, &options(false)).unwrap();
        link.submit(store.transfer(1, 0, CHUNK, Urgency::Demand));
        link.submit(store.transfer(1, CHUNK, CHUNK, Urgency::Demand));
    }));
    assert!(twice.is_err());
    for wrong in [
        LinkOptions { chunk_bytes: 0, ..options(false) },
        LinkOptions { in_flight: 0, prefetch_in_flight: 0, ..options(false) },
        LinkOptions { in_flight: 2, prefetch_in_flight: 3, ..options(false) },
        LinkOptions { prefetch_in_flight: 0, ..options(false) },
    ] {
        let result = Link::<PinnedPart>::new(&device, &wrong);
        assert!(matches!(result, Err(CudaError::Shape { .. })), "{wrong:?}");
    }
}
