//! Words that tell kernels of a copy that is whole.

use crate::links::{CHUNK, Store, options};
use crate::world::{Fault, Settings, any_device, drains, standin};
use pregate_kernels::cuda::{Landed, Link, Part, Transfer, Urgency};

#[test]
fn a_word_is_published_behind_the_last_byte_of_what_arrives() {
    for settings in drains() {
        let Some(world) = standin(settings) else { return };
        let device = world.open().unwrap();
        let store = Store::new(&device, 40 * CHUNK);
        let words = device.arena(16).unwrap().take(16, 4).unwrap();
        device.compute().fill(&words, 0).unwrap();
        device.compute().synchronize().unwrap();
        let mut link = Link::new(&device, &options(false)).unwrap();
        for key in 0..4 {
            let from = key as usize * 10 * CHUNK;
            let mut transfer = store.transfer(key, from, 10 * CHUNK, Urgency::Prefetch);
            transfer.parts = vec![
                Part { from: 5 * CHUNK..10 * CHUNK, to: 5 * CHUNK },
                Part { from: 0..5 * CHUNK, to: 0 },
            ];
            let word = words.part(4 * key as usize..4 * key as usize + 4);
            transfer.publish = Some((word, 100 + key as u32));
            link.submit(transfer);
        }
        link.discard(2);
        let (mut landed, mut both) = (0u32, vec![0; 16]);
        while landed.count_ones() < 4 {
            if let Some(Landed { key, result, .. }) = link.next(0) {
                assert_eq!(result.is_err(), key == 2, "{result:?}");
                landed |= 1 << key;
            }
            // On the link's own stream, between what it has submitted.
            device.copy().download(&words, &mut both).unwrap();
            let contents = store.contents(&device);
            for (key, word) in both.as_chunks::<4>().0.iter().enumerate() {
                let range = key * 10 * CHUNK..(key + 1) * 10 * CHUNK;
                let has_come = contents[range.clone()] == store.block[range];
                match u32::from_ne_bytes(*word) {
                    0 => assert!(landed & (1 << key) == 0 || key == 2, "{key} landed"),
                    value => assert!(value == 100 + key as u32 && has_come && key != 2, "{key}"),
                }
            }
        }
        world.assert_no_violation();
    }
}

#[test]
fn a_word_that_cannot_be_published_lands_no_transfer() {
    let Some(world) = standin(Settings::default()) else { return };
    for failures in 1..=2 {
        world.reset(Settings::default());
        let device = world.open().unwrap();
        let store = Store::new(&device, 3 * CHUNK);
        let words = device.arena(4).unwrap().take(4, 4).unwrap();
        device.compute().fill(&words, 0).unwrap();
        device.compute().synchronize().unwrap();
        let mut link = Link::new(&device, &options(false)).unwrap();
        let before = world.calls_of("cuMemcpyHtoDAsync");
        // Three chunks and the word; then the last chunk and the word. A call
        // that fails is not counted by the rules behind its own.
        for call in [4, 5].into_iter().take(failures) {
            world.fail_call("cuMemcpyHtoDAsync", call, Fault::Once, 801);
        }
        let publish = Some((words.clone(), 5));
        link.submit(Transfer { publish, ..store.transfer(1, 0, 3 * CHUNK, Urgency::Demand) });
        let landed = link.next(u64::MAX).unwrap();
        // It is tried once more.
        assert_eq!(landed.result.is_ok(), failures == 1, "{:?}", landed.result);
        assert!(landed.memory.is_some(), "no copy uses it");
        let mut word = [0; 4];
        device.compute().download(&words, &mut word).unwrap();
        assert_eq!(u32::from_ne_bytes(word), if failures == 1 { 5 } else { 0 });
        assert_eq!(world.calls_of("cuMemcpyHtoDAsync") - before, 6);
        assert_eq!(world.calls_of("cuMemsetD32Async"), 0);
        assert!(link.next(u64::MAX).is_none(), "it landed once");
        world.assert_no_violation();
    }
}

#[test]
#[should_panic(expected = "is no word")]
fn a_word_has_four_bytes() {
    let Some((_turn, device)) = any_device() else { panic!("is no word") };
    let store = Store::new(&device, CHUNK);
    let mut link = Link::new(&device, &options(false)).unwrap();
    let publish = Some((store.span.part(0..8), 5));
    link.submit(Transfer { publish, ..store.transfer(1, 0, CHUNK, Urgency::Demand) });
}
