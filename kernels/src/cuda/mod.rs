//! NVIDIA GPUs through the CUDA driver: the device, its memory, streams and
//! copies, and the kernels of `kernels/cuda`.
//!
//! No toolkit is needed to build or to run. The driver is loaded when a
//! [`Device`] is opened; a machine without one answers with
//! [`CudaError::NoDriver`]. Lowest driver: 550 (CUDA 12.4); lowest GPU: compute
//! capability 7.5.

mod args;
mod attention;
mod attention_prepare;
mod backend;
mod cells;
mod compile;
mod delta_net;
mod dense;
mod device;
mod driver;
mod error;
mod experts;
mod flash;
mod flight;
mod functions;
mod gate;
mod gemm;
mod graph;
mod kernel_table;
mod link;
mod link_job;
mod link_state;
pub mod logits;
mod mailbox;
mod mailbox_layout;
mod mapped;
mod memory;
mod module;
mod position;
mod probe;
pub mod router;
pub mod router_chunk;
mod rows;
mod shape;
mod stream;
mod ticket;
mod workspace;

pub use attention::{Attend, AttendPlan, OutputGate, attend};
pub use attention_prepare::{
    HeadNorms, Pairs, PrepareHeads, PrepareLatent, Rotation, prepare_heads, prepare_latent,
};
pub use backend::Cuda;
pub use cells::{CellFormat, DeviceCells};
pub use delta_net::{
    DELTA_CHUNK, DeltaConv, DeltaDecode, DeltaInputs, DeltaPrefill, DeltaShape, delta_conv,
    delta_decode, delta_prefill,
};
pub use dense::{
    Embed, Gemv, Norm, NormKind, Quantise, Strides, add_scaled, embed, gemv, norm, quantise,
    transposed,
};
pub use device::{Device, DeviceInfo, DeviceOptions};
pub use error::{CudaError, LOWEST_CAPABILITY, LOWEST_VERSION, Version};
pub use experts::{
    Choices, Combine, Down, ExpertMatrix, GateUp, HostRows, SharedAnswer, combine, down, gate_up,
};
pub use flash::{Flash, flash, has_flash};
pub use gate::Entered;
pub use gemm::{Gemm, GroupGemm, Groups, Up, gemm, group_gemm, group_tiles};
pub use graph::Graph;
pub use link::{Landed, Link, LinkCounters, LinkError, LinkOptions, Part, Transfer, Urgency};
pub use mailbox::{
    AheadLogits, BeginStep, ENTRY_BYTES, ExpertArena, Post, Settle, begin_step, post, settle,
};
pub use mailbox_layout::{Decision, MOST_CHOICES, MailboxLayout, Posted, StepError, StepLayout};
pub use mapped::Mapped;
pub use memory::{
    Arena, HostMemory, HostPart, HostTarget, PADDING_BYTES, Pinned, PinnedPart, Span,
};
pub use module::{Modules, built_in_modules};
pub use position::{At, STEP_WORDS};
pub use probe::{ProbeProduct, probe_copy, probe_empty, probe_products, probe_read};
pub use rows::{Input, MOST_TOKENS, QuantisedSpans};
pub use stream::{Event, Stream};
pub use ticket::{Refused, Ticket};

use crate::format::Format;

/// A weight matrix on the device, rows behind each other without a gap.
#[derive(Clone)]
pub struct DeviceMatrix {
    pub format: Format,
    /// `[rows, cols]`
    pub rows: usize,
    pub cols: usize,
    pub span: Span,
    /// Where row 0 starts, in bytes from the start of `span`.
    pub offset: usize,
}

impl DeviceMatrix {
    /// # Errors
    /// [`CudaError::Shape`] when the matrix does not lie in the span.
    pub fn new(
        format: Format,
        rows: usize,
        cols: usize,
        span: Span,
        offset: usize,
    ) -> Result<Self, CudaError> {
        let matrix = Self { format, rows, cols, span, offset };
        matrix.check("matrix")?;
        Ok(matrix)
    }

    /// Bytes of a row. 0 if the columns are not whole blocks, which
    /// [`DeviceMatrix::check`] refuses.
    pub fn row_bytes(&self) -> usize {
        self.format.row_bytes(self.cols).unwrap_or(0)
    }

    /// Bytes of all rows: what a product must read of it.
    pub fn bytes(&self) -> u64 {
        self.rows as u64 * self.row_bytes() as u64
    }

    /// Where row 0 starts, for the device.
    pub fn address(&self) -> u64 {
        self.span.address() + self.offset as u64
    }

    /// Refuses a matrix that is empty, has a broken block, or does not lie in
    /// its span; for launchers, whose fields are public.
    pub fn check(&self, call: &'static str) -> Result<(), CudaError> {
        let Self { format, rows, cols, .. } = self;
        let needed = format
            .row_bytes(*cols)
            .filter(|bytes| *bytes > 0 && *rows > 0)
            .and_then(|bytes| bytes.checked_mul(*rows)?.checked_add(self.offset));
        match needed {
            Some(needed) if needed <= self.span.bytes() => Ok(()),
            _ => Err(CudaError::shape(
                call,
                format!(
                    "{format} matrix [{rows}, {cols}] at {} of {} bytes",
                    self.offset,
                    self.span.bytes()
                ),
            )),
        }
    }
}
