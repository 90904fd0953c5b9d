//! What a model asks of memory.

use crate::model::OpenedModel;
use pregate_predictor::Shape;

/// A model's sizes in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Of all files: what a mapped model takes.
    pub whole_bytes: u64,
    /// What streaming keeps in memory: all tensors but those of routed
    /// experts, and but the embedding table where it is not also the head.
    pub dense_bytes: u64,
    /// The layers' experts; classes index `class_bytes`.
    pub shape: Shape,
    /// Bytes of a frame per class: one expert with its alignment, a multiple
    /// of 4096.
    pub class_bytes: Vec<u64>,
}

impl Sizes {
    pub fn of(opened: &OpenedModel) -> Self {
        let (files, layout) = (opened.files(), opened.layout());
        Self {
            whole_bytes: files.total_bytes(),
            dense_bytes: files.size_to_hold(&opened.tensors_of_every_token()),
            shape: layout.shape.clone(),
            class_bytes: layout.class_bytes.iter().map(|bytes| *bytes as u64).collect(),
        }
    }
}
