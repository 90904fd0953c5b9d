//! Host memory for experts, where it has no room for all of them: blocks for
//! some, and frames that the others are read into from disk.

use super::needs::Experts;
use crate::files::ModelFiles;
use crate::model::description::ModelDescription;
use crate::model::weights::ModelWeights;
use crate::store::layout::ModelLayout;
use pregate_predictor::LayerShape;
use serde::Serialize;

/// Of the room, for frames: what was read stays there for a while, which
/// follows the text; blocks do not, and no long prompt sweeps them out. Not
/// measured yet.
const FRAMES_SHARE: u64 = 4;

/// How the host shares its room.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DiskShare {
    /// Experts with a block, per layer of the model.
    pub kept: Vec<usize>,
    /// Frames for the others, per class of the model's layout.
    pub frames: Vec<usize>,
    pub frames_bytes: u64,
    /// Experts without a block.
    pub on_disk: usize,
}

/// Least room of the host: frames for the experts of one token of any layer,
/// and one more of each size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostTooSmall {
    pub needed_bytes: u64,
    pub room_bytes: u64,
}

impl DiskShare {
    /// Of `room_bytes`, and what blocks and frames take of it. No expert is
    /// fixed on the device.
    pub(super) fn of(
        files: &ModelFiles,
        description: &ModelDescription,
        weights: &ModelWeights,
        experts: &Experts,
        room_bytes: u64,
    ) -> Result<(Self, u64), HostTooSmall> {
        let layout = ModelLayout::new(files, weights, |layer| description.top_k(layer));
        let classes = layout.class_bytes.len();
        let of_class = |class: usize, of: fn(&LayerShape) -> usize| -> Vec<usize> {
            let layers = layout.shape.moe().filter(move |(_, layer)| layer.class == class);
            layers.map(|(_, layer)| of(layer)).collect()
        };
        let all: Vec<usize> =
            (0..classes).map(|class| of_class(class, |layer| layer.experts).iter().sum()).collect();
        let mut frames: Vec<usize> = (0..classes)
            .map(|class| of_class(class, |layer| layer.top_k).into_iter().max().unwrap_or(0) + 1)
            .collect();
        let bytes = |frames: &[usize]| -> u64 {
            let classes = layout.class_bytes.iter().zip(frames);
            classes.map(|(&bytes, &count)| bytes as u64 * count as u64).sum()
        };
        let needed_bytes = bytes(&frames);
        if needed_bytes > room_bytes {
            return Err(HostTooSmall { needed_bytes, room_bytes });
        }
        // One more of each size at a time, as long as there are experts.
        loop {
            let more: Vec<usize> = frames
                .iter()
                .zip(&all)
                .map(|(&count, &all)| (count + 1).min(all.max(count)))
                .collect();
            if more == frames || bytes(&more) > room_bytes / FRAMES_SHARE {
                break;
            }
            frames = more;
        }
        let frames_bytes = bytes(&frames);
        let kept = experts.fill(|_, bytes| bytes <= room_bytes - frames_bytes);
        let on_disk = all.iter().sum::<usize>() - kept.iter().sum::<usize>();
        let host_bytes = experts.bytes(&kept) + frames_bytes;
        Ok((Self { kept, frames, frames_bytes, on_disk }, host_bytes))
    }
}
