//! What the parts of a pass share.

use super::GpuModel;
use super::buffers::{Buffers, FEW_TOKENS};
use super::exchange::Exchange;
use super::token::Step;
use super::upload::DeviceProjection;
use super::weights::DeviceNorm;
use crate::forward::{Engine, Meter};
use crate::model::description::{ModelDescription, NormKind, RopePairs};
use crate::model::rope::Rope;
use crate::session::Cancel;
use pregate_kernels::cuda::{
    self, At, CudaError, Device, DeviceMatrix, Gemm, Gemv, HostPart, Input, Norm, Pairs, Quantise,
    QuantisedSpans, Rotation, Span, Stream, Ticket,
};
use pregate_kernels::{ActivationKind, Format};
use pregate_predictor::Observer;

/// What goes with a pass through its layers.
pub struct Companions<'a, 'm> {
    pub observer: &'a mut dyn Observer,
    pub cancel: &'a Cancel,
    pub meter: &'a mut Meter<'m>,
    /// Copies to the device that may still be under way.
    pub sent: Vec<Ticket<HostPart>>,
}

/// A pass over a few tokens.
#[derive(Clone, Copy)]
pub struct Pass<'a> {
    pub model: &'a GpuModel,
    /// Of the host.
    pub engine: Engine<'a>,
    pub description: &'a ModelDescription,
    pub buffers: &'a Buffers,
    pub ropes: &'a [Rope],
    /// What the host gives, and what routers leave.
    pub exchange: &'a Exchange,
    /// At most those that the buffers are for.
    pub tokens: usize,
    pub first_position: usize,
    /// The device computes its one token by itself.
    pub step: Option<Step<'a>>,
}

/// The form among two that `format` reads; `None`: it reads floats.
fn form(forms: &[QuantisedSpans; 2], format: Format) -> Option<&QuantisedSpans> {
    let quantised = format.activation() != ActivationKind::F32;
    quantised.then(|| &forms[usize::from(format.block_len() == 256)])
}

impl<'a> Pass<'a> {
    pub fn device(&self) -> &'a Device {
        self.model.device()
    }

    pub fn stream(&self) -> &'a Stream {
        self.device().compute()
    }

    /// Where token `first` of the pass stands.
    pub fn at(&self, first: usize) -> At<'a> {
        match self.step {
            Some(Step { path, most }) => At::Step { words: &path.words, most },
            None => At::Host(self.first_position + first),
        }
    }

    pub fn epsilon(&self) -> f32 {
        match self.description.norm {
            NormKind::Rms { epsilon } | NormKind::Layer { epsilon } => epsilon,
        }
    }

    /// Adds `delta` to the stream if it holds what a block adds, and leaves
    /// the norm of the last `rows` tokens in `normed`, also as `formats` read
    /// it.
    pub fn norm(
        &self,
        norm: &DeviceNorm,
        has_delta: bool,
        rows: usize,
        formats: &[Format],
    ) -> Result<(), CudaError> {
        let Buffers { delta, normed, normed_forms, .. } = self.buffers;
        let x = &self.exchange.x;
        let width = self.description.hidden;
        let last =
            |span: &Span| span.part(4 * width * (self.tokens - rows)..4 * width * self.tokens);
        let (x, delta) = (last(x), last(delta));
        let kind = match self.description.norm {
            NormKind::Rms { .. } => cuda::NormKind::Rms,
            NormKind::Layer { .. } => cuda::NormKind::Layer { bias: norm.bias.as_ref() },
        };
        let wanted = |to: &&QuantisedSpans| {
            formats.iter().any(|&format| {
                form(normed_forms, format).is_some_and(|form| form.group == to.group)
            })
        };
        let quantised: Vec<&QuantisedSpans> = normed_forms.iter().filter(wanted).collect();
        let call = Norm {
            kind,
            rows,
            width,
            x: &x,
            x_stride: width,
            delta: has_delta.then_some((&delta, self.description.residual_scale)),
            weight: &norm.weight,
            epsilon: self.epsilon(),
            out: Some((normed, width)),
            quantised: &quantised,
        };
        cuda::norm(self.device(), self.stream(), call)
    }

    /// What [`Pass::norm`] left, for a matrix of `format`.
    pub fn normed(&self, format: Format) -> Input<'a> {
        match form(&self.buffers.normed_forms, format) {
            Some(form) => Input::Quantised(form),
            None => Input::Floats(&self.buffers.normed),
        }
    }

    /// `x`, `[rows, cols]` of rows `stride` apart, for a matrix of `format`.
    /// Its one buffer is overwritten.
    pub fn input<'s>(
        &'s self,
        format: Format,
        x: &'s Span,
        (rows, cols): (usize, usize),
        stride: usize,
    ) -> Result<Input<'s>, CudaError> {
        self.input_in(&self.buffers.mixer_forms, format, x, (rows, cols), stride)
    }

    /// [`Pass::input`] in buffers of the caller's choice.
    pub fn input_in<'s>(
        &self,
        forms: &'s [QuantisedSpans; 2],
        format: Format,
        x: &'s Span,
        (rows, cols): (usize, usize),
        stride: usize,
    ) -> Result<Input<'s>, CudaError> {
        let Some(to) = form(forms, format) else {
            return Ok(Input::Floats(x));
        };
        let call = Quantise { rows, cols, x, stride, to };
        cuda::quantise(self.device(), self.stream(), call)?;
        Ok(Input::Quantised(to))
    }

    /// `out [tokens, rows] = x W^T + bias`
    pub fn product(
        &self,
        projection: &DeviceProjection,
        tokens: usize,
        x: Input<'_>,
        out: &Span,
    ) -> Result<(), CudaError> {
        self.multiply(&projection.weight, projection.bias.as_ref(), tokens, x, out)
    }

    /// [`Pass::product`] of a matrix and a bias of their own.
    pub fn multiply(
        &self,
        weight: &DeviceMatrix,
        bias: Option<&Span>,
        tokens: usize,
        x: Input<'_>,
        out: &Span,
    ) -> Result<(), CudaError> {
        let (device, stream) = (self.device(), self.stream());
        if tokens > FEW_TOKENS {
            return cuda::gemm(device, stream, &Gemm { weight, bias, x, tokens, out });
        }
        cuda::gemv(device, stream, Gemv::one(weight, tokens, x, bias, out))
    }

    /// [`Pass::product`] of rows that were not quantised yet.
    pub fn product_of(
        &self,
        projection: &DeviceProjection,
        x: &Span,
        out: &Span,
    ) -> Result<(), CudaError> {
        let weight = &projection.weight;
        let input = self.input(weight.format, x, (self.tokens, weight.cols), weight.cols)?;
        self.product(projection, self.tokens, input, out)
    }

    /// First token and number of tokens of the pieces that decode's kernels
    /// take.
    pub fn pieces(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        let tokens = self.tokens;
        (0..tokens).step_by(FEW_TOKENS).map(move |first| (first, FEW_TOKENS.min(tokens - first)))
    }

    pub fn rotation(&self, rope: usize) -> Rotation<'a> {
        let pairs = match self.ropes[rope].pairs() {
            RopePairs::Halves => Pairs::Halves,
            RopePairs::Neighbours => Pairs::Neighbours,
        };
        Rotation { table: &self.exchange.tables[rope], half: self.ropes[rope].half(), pairs }
    }
}

/// Rows `first..` of `[rows, width]` f32.
pub fn from_row(span: &Span, first: usize, width: usize) -> Span {
    span.part(4 * first * width..span.bytes())
}

/// Appends `count` f32 from the start of a span, behind what was submitted to
/// the stream. `bytes` is room for them.
pub fn read_floats(
    stream: &Stream,
    span: &Span,
    count: usize,
    bytes: &mut Vec<u8>,
    to: &mut Vec<f32>,
) -> Result<(), CudaError> {
    bytes.resize(4 * count, 0);
    stream.download(&span.part(0..bytes.len()), bytes)?;
    to.extend(bytes.as_chunks::<4>().0.iter().map(|word| f32::from_ne_bytes(*word)));
    Ok(())
}

/// Words of four bytes from the start of a span, behind what was submitted to
/// the stream.
pub fn words(
    stream: &Stream,
    span: &Span,
    count: usize,
) -> Result<impl Iterator<Item = [u8; 4]> + use<>, CudaError> {
    let mut bytes = vec![0; 4 * count];
    stream.download(&span.part(0..bytes.len()), &mut bytes)?;
    Ok(bytes.as_chunks::<4>().0.to_vec().into_iter())
}
