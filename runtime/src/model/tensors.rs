//! Finds tensors by their names in either kind of file, checks shapes, and
//! remembers what was used.

use super::weights::{Norm, Place, Projection, Weight};
use crate::error::{Error, Result};
use crate::files::{Container, ElementType, ModelFiles, TensorInfo};
use pregate_kernels::Format;
use pregate_kernels::dequant::dequantize_row;
use std::{cell::RefCell, collections::HashSet, ops::Range};

/// A tensor name in both spellings; an empty one does not exist there.
#[derive(Clone, Copy, Debug)]
pub struct Name {
    pub gguf: &'static str,
    pub hf: &'static str,
}

/// Names tensors and checks them.
pub struct Tensors<'a> {
    files: &'a ModelFiles,
    is_gguf: bool,
    /// What stands before `layers.` and `embed_tokens` in a folder's names.
    hf_prefix: &'static str,
    used: RefCell<HashSet<usize>>,
}

impl<'a> Tensors<'a> {
    pub fn new(files: &'a ModelFiles) -> Self {
        let hf_prefix = ["model.language_model.", "language_model.model.", "model.", ""]
            .into_iter()
            .find(|prefix| files.tensor(&format!("{prefix}embed_tokens.weight")).is_some())
            .unwrap_or("model.");
        Self {
            files,
            is_gguf: matches!(files.container(), Container::Gguf(_)),
            hf_prefix,
            used: RefCell::default(),
        }
    }

    pub fn is_gguf(&self) -> bool {
        self.is_gguf
    }

    /// The full name of a layer's tensor.
    pub fn in_layer(&self, layer: usize, name: Name) -> String {
        match self.is_gguf {
            true => format!("blk.{layer}.{}", name.gguf),
            false => format!("{}layers.{layer}.{}", self.hf_prefix, name.hf),
        }
    }

    /// The full name of a tensor beside the layers; `lm_head` has no prefix.
    pub fn global(&self, name: Name) -> String {
        match self.is_gguf {
            true => name.gguf.to_string(),
            false if name.hf.starts_with("lm_head") => name.hf.to_string(),
            false => format!("{}{}", self.hf_prefix, name.hf),
        }
    }

    /// Looks a tensor up and counts it as used.
    pub fn find(&self, name: &str) -> Option<(usize, &'a TensorInfo)> {
        let index = self.files.tensor_index(name)?;
        self.used.borrow_mut().insert(index);
        Some((index, &self.files.tensors()[index]))
    }

    pub fn has(&self, name: &str) -> bool {
        self.files.tensor_index(name).is_some()
    }

    pub fn require(&self, name: &str) -> Result<(usize, &'a TensorInfo)> {
        self.find(name).ok_or_else(|| {
            let file = &self.files.paths()[0];
            Error::invalid(
                file,
                None,
                format!("tensor {name}"),
                "nothing",
                "the tensor: the file is incomplete, or of a variant that we do not know",
            )
        })
    }

    /// The error for a tensor that is not as the description wants it.
    pub fn mismatch(&self, tensor: &TensorInfo, allowed: impl Into<String>) -> Error {
        let found = match tensor.element {
            ElementType::Format(format) => format!("{format} {:?}", tensor.shape),
            ElementType::U8 => format!("U8 {:?}", tensor.shape),
        };
        let file = &self.files.paths()[tensor.file];
        Error::invalid(file, Some(tensor.offset), format!("tensor {}", tensor.name), found, allowed)
    }

    /// The format of a tensor with this shape; dimensions of 1 in front do
    /// not count.
    pub fn check(&self, tensor: &TensorInfo, shape: &[usize]) -> Result<Format> {
        let bare =
            |dims: &[usize]| dims.iter().copied().skip_while(|&d| d == 1).collect::<Vec<_>>();
        match tensor.element {
            ElementType::Format(format) if bare(&tensor.shape) == bare(shape) => Ok(format),
            _ => Err(self.mismatch(tensor, format!("shape {shape:?}"))),
        }
    }

    /// A whole tensor as a matrix.
    pub fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Weight> {
        let (index, tensor) = self.require(name)?;
        let format = self.check(tensor, &[rows, cols])?;
        self.part(index, format, rows, cols, 0, 1)
    }

    /// `rows` rows (every `step`-th) from row `first` of a tensor of rows of
    /// `cols` elements.
    pub fn part(
        &self,
        index: usize,
        format: Format,
        rows: usize,
        cols: usize,
        first: usize,
        step: usize,
    ) -> Result<Weight> {
        let tensor = &self.files.tensors()[index];
        let row_bytes = format.row_bytes(cols).ok_or_else(|| {
            self.mismatch(tensor, format!("rows of whole blocks of {}", format.block_len()))
        })?;
        let end = first
            .checked_add((rows - 1).saturating_mul(step))
            .and_then(|row| row.checked_add(1)?.checked_mul(row_bytes));
        if end.is_none_or(|end| end > tensor.bytes) {
            return Err(
                self.mismatch(tensor, format!("at least {rows} rows of {cols} from row {first}"))
            );
        }
        let place = Place::Rows { start: first * row_bytes, step };
        Ok(Weight { tensor: index, format, rows, cols, place })
    }

    /// A matrix and, if the file has one, its bias.
    pub fn projection(
        &self,
        weight: &str,
        bias: Option<&str>,
        rows: usize,
        cols: usize,
    ) -> Result<Projection> {
        let bias = match bias {
            Some(name) if self.has(name) => Some(self.vector(name, rows)?),
            _ => None,
        };
        Ok(Projection { weight: self.matrix(weight, rows, cols)?, bias })
    }

    /// A small tensor of `len` elements in all, as f32.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let (_, tensor) = self.require(name)?;
        let format = match tensor.element {
            ElementType::Format(format)
                if format.block_len() == 1 && tensor.shape.iter().product::<usize>() == len =>
            {
                format
            }
            _ => return Err(self.mismatch(tensor, format!("{len} elements of F32, F16 or BF16"))),
        };
        let mut values = vec![0.0; len];
        dequantize_row(format, self.files.bytes(tensor), &mut values);
        Ok(values)
    }

    /// A normalisation; the bias is taken if the file has one.
    pub fn norm(&self, name: &str, width: usize) -> Result<Norm> {
        let bias = name.strip_suffix("weight").map(|stem| format!("{stem}bias"));
        let bias = match bias {
            Some(bias) if self.has(&bias) => Some(self.vector(&bias, width)?),
            _ => None,
        };
        Ok(Norm { weight: self.vector(name, width)?, bias })
    }

    /// Tensors that nothing asked for and that are not known to be beside the
    /// language model: computing without them would be silently wrong.
    pub fn check_all_used(&self, extra_layers: Range<usize>) -> Result<()> {
        let used = self.used.borrow();
        let unused = self.files.tensors().iter().enumerate().find(|(index, tensor)| {
            !used.contains(index) && !self.is_beside(&tensor.name, &extra_layers)
        });
        match unused {
            None => Ok(()),
            Some((_, tensor)) => Err(Error::Unsupported {
                file: self.files.paths()[tensor.file].clone(),
                what: "tensor",
                found: format!("{:?} (nothing in this architecture reads it)", tensor.name),
                supported: "the tensors of the architecture's published form".to_string(),
            }),
        }
    }

    /// Rotary tables, vision towers and multi-token-prediction layers.
    fn is_beside(&self, name: &str, extra_layers: &Range<usize>) -> bool {
        let layer = match self.is_gguf {
            true => name.strip_prefix("blk."),
            false => name.strip_prefix(self.hf_prefix).and_then(|n| n.strip_prefix("layers.")),
        };
        let extra_layer = layer
            .and_then(|rest| rest.split('.').next()?.parse::<usize>().ok())
            .is_some_and(|index| extra_layers.contains(&index));
        extra_layer
            || name.contains("rotary_emb.inv_freq")
            || [
                "rope_freqs.",
                "rope_factors_",
                "mtp.",
                "model.mtp.",
                "visual.",
                "model.visual.",
                "vision_tower.",
            ]
            .iter()
            .any(|prefix| name.starts_with(prefix))
    }
}
