//! How large the parts of a trained forecast are.

use super::input::{REACH, Rows};
use super::matrix::Matrix;
use super::network::Sizes;
use crate::Shape;

/// The token-only forecast looks at embeddings of this token, the one before,
/// and two decayed means.
pub const PLACES: usize = 4;

/// All sizes. Layers are the MoE layers, experts those of the widest.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Dimensions {
    pub layers: usize,
    pub experts: usize,
    /// Token ids that are known.
    pub ids: usize,
    /// Layers back that tables have pairs for, beside those with the token
    /// before; 0: there are none at all.
    pub pair_reach: usize,
    /// Layers back that a network looks at.
    pub reach: usize,
    /// Units of a network; 0: there are none.
    pub hidden: usize,
    /// 1: a network has [`Sizes::is_direct`].
    pub direct: usize,
    /// Units and width of an embedding of the token-only forecast; 0: none.
    pub path_hidden: usize,
    pub path_width: usize,
}

impl Dimensions {
    /// Numbers of a file that are not in the shape.
    pub const NUMBERS: usize = 7;

    pub fn new(shape: &Shape, numbers: [usize; Self::NUMBERS]) -> Self {
        let [ids, pair_reach, reach, hidden, direct, path_hidden, path_width] = numbers;
        let layers = shape.moe().count();
        let experts = shape.moe().map(|(_, layer)| layer.experts).max().unwrap_or(0);
        Self { layers, experts, ids, pair_reach, reach, hidden, direct, path_hidden, path_width }
    }

    pub fn numbers(&self) -> [usize; Self::NUMBERS] {
        let &Self { ids, pair_reach, reach, hidden, direct, path_hidden, path_width, .. } = self;
        [ids, pair_reach, reach, hidden, direct, path_hidden, path_width]
    }

    /// The largest that fit `limit_bytes`, for a model with `ids` token ids:
    /// networks get smaller first, then they look less far back, and what is
    /// left goes to token ids.
    pub fn fitting(shape: &Shape, ids: usize, limit_bytes: usize) -> Self {
        let fits = |d: &Self| d.bytes().is_some_and(|bytes| bytes <= limit_bytes);
        // Ids come last, but an eighth is theirs.
        let one = Self::new(shape, [1, 0, 1, 0, 0, 0, 0]);
        let few = ids.min(limit_bytes / 8 / (one.layers * one.experts).max(64));
        let sizes =
            [(192, 11, 4, 1), (192, 8, 4, 1), (160, 8, 4, 1), (128, 8, 4, 1), (96, 8, 2, 1)];
        let small = [(96, 4, 2, 1), (64, 4, 1, 1), (64, 2, 1, 1), (32, 2, 1, 1), (64, 4, 0, 0)];
        let smaller = [(32, 4, 0, 0), (32, 2, 0, 0), (16, 2, 0, 0), (16, 1, 0, 0)];
        let mut best = Self::new(shape, [0, 0, 1, 0, 0, 0, 0]);
        let sizes = sizes.into_iter().chain(small).chain(smaller);
        for (hidden, reach, pair_reach, direct) in sizes {
            let (path_hidden, path_width) = if ids > 0 { (hidden, 32) } else { (0, 0) };
            let numbers = [few, pair_reach, reach, hidden, direct, path_hidden, path_width];
            let wanted = Self::new(shape, numbers);
            if fits(&wanted) {
                best = wanted;
                break;
            }
        }
        while best.ids < ids && fits(&Self { ids: (best.ids + 64).min(ids), ..best }) {
            best.ids = (best.ids + 64).min(ids);
        }
        best
    }

    /// Within what the code was made for?
    pub fn is_valid(&self) -> bool {
        self.reach >= 1
            && self.reach <= REACH
            && self.pair_reach <= REACH
            && self.hidden <= 4096
            && self.direct <= 1
            && self.path_hidden <= 4096
            && self.path_width <= 4096
            && (self.path_hidden == 0) == (self.path_width == 0)
    }

    /// Layers that have a network.
    pub fn networks(&self) -> usize {
        if self.hidden > 0 { self.layers } else { 0 }
    }

    /// Of each layer's network.
    pub fn network(&self) -> Sizes {
        let rows = Rows { reach: self.reach, experts: self.experts };
        Sizes { rows, experts: self.experts, hidden: self.hidden, is_direct: self.direct == 1 }
    }

    /// Rows and columns of odds, priors and pairs.
    pub fn tables(&self) -> [(usize, usize); 3] {
        let blocks = if self.pair_reach > 0 { self.pair_reach + 1 } else { 0 };
        let pairs = self.layers * blocks * self.experts;
        [(self.ids, self.layers * self.experts), (self.layers, self.experts), (pairs, self.experts)]
    }

    /// Rows and columns of embeddings, and of the matrices in and out.
    pub fn path(&self) -> [(usize, usize); 3] {
        if self.path_hidden == 0 {
            return [(0, 0); 3];
        }
        [
            (self.ids, self.path_width),
            (PLACES * self.path_width + 1, self.path_hidden),
            (self.layers * (self.path_hidden + 2), self.experts),
        ]
    }

    /// Bytes of ids and matrices in a file; `None` beyond `usize`. Products of
    /// sizes that a file may name do not overflow 64 bits before they are
    /// compared: each is below 2^32, and layers and experts below 2^16.
    pub fn bytes(&self) -> Option<usize> {
        if !self.is_valid() {
            return None;
        }
        let parts = self.network().matrices();
        let networks = (0..self.networks()).flat_map(|_| parts);
        let all = self.tables().into_iter().chain(networks).chain(self.path());
        all.map(|(rows, columns)| Matrix::bytes(rows, columns))
            .try_fold(self.ids.checked_mul(4)?, |sum, bytes| sum.checked_add(bytes?))
    }
}
