//! The tensors of a model by name, over all of its files.

use super::TensorInfo;
use crate::error::{Error, Result};
use std::{collections::HashMap, path::Path};

/// Tensors in file order and an index by name.
#[derive(Debug, Default)]
pub struct TensorTable {
    list: Vec<TensorInfo>,
    index: HashMap<String, usize>,
}

impl TensorTable {
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes room for `count` more.
    pub(super) fn reserve(&mut self, count: usize) {
        self.list.reserve(count);
        self.index.reserve(count);
    }

    /// Refuses a name that is there already; `file` and `offset` say where
    /// this tensor is described.
    pub fn insert(&mut self, file: &Path, offset: Option<u64>, tensor: TensorInfo) -> Result<()> {
        let number = self.list.len();
        if self.index.insert(tensor.name.clone(), number).is_some() {
            return Err(Error::invalid(
                file,
                offset,
                format!("tensor {}", tensor.name),
                "a second tensor of this name",
                "each name once in a model",
            ));
        }
        self.list.push(tensor);
        Ok(())
    }

    pub fn all(&self) -> &[TensorInfo] {
        &self.list
    }

    /// Index into [`TensorTable::all`].
    pub fn index(&self, name: &str) -> Option<usize> {
        self.index.get(name).copied()
    }

    pub fn get(&self, name: &str) -> Option<&TensorInfo> {
        self.list.get(self.index(name)?)
    }
}
