//! Checks and arguments that launchers share.

use super::args::Args;
use super::{CudaError, Span};

/// `value` as a kernel's `int`.
pub(super) fn int(call: &'static str, what: &str, value: usize) -> Result<i32, CudaError> {
    i32::try_from(value)
        .map_err(|_| CudaError::shape(call, format!("{what} is {value}, above {}", i32::MAX)))
}

/// A number of blocks of threads.
pub(super) fn blocks(call: &'static str, count: usize) -> Result<u32, CudaError> {
    Ok(int(call, "blocks", count)? as u32)
}

/// `a * b`, or an error.
pub(super) fn product(call: &'static str, factors: &[usize]) -> Result<usize, CudaError> {
    factors
        .iter()
        .try_fold(1usize, |product, factor| product.checked_mul(*factor))
        .ok_or_else(|| CudaError::shape(call, format!("the product of {factors:?} overflows")))
}

/// Refuses a span that has not `count` elements of `size` bytes, or does not
/// start at a multiple of `align` bytes.
pub(super) fn holds(
    call: &'static str,
    what: &str,
    span: &Span,
    count: usize,
    size: usize,
    align: u64,
) -> Result<(), CudaError> {
    let needed = product(call, &[count, size])?;
    if span.bytes() < needed {
        let found = span.bytes();
        return Err(CudaError::shape(call, format!("{what} needs {needed} bytes, has {found}")));
    }
    if !span.address().is_multiple_of(align) {
        let problem = format!("{what} does not start at a multiple of {align} bytes");
        return Err(CudaError::shape(call, problem));
    }
    Ok(())
}

/// [`holds`] for f32, i32 or u32.
pub(super) fn holds_words(
    call: &'static str,
    what: &str,
    span: &Span,
    count: usize,
) -> Result<(), CudaError> {
    holds(call, what, span, count, 4, 4)
}

/// [`holds`] for f32 of a shape.
pub(super) fn holds_floats(
    call: &'static str,
    what: &str,
    span: &Span,
    shape: &[usize],
    align: u64,
) -> Result<(), CudaError> {
    holds(call, what, span, product(call, shape)?, 4, align)
}

/// [`holds_words`] where there is a span.
pub(super) fn may_hold(
    call: &'static str,
    what: &str,
    span: Option<&Span>,
    count: usize,
) -> Result<(), CudaError> {
    span.map_or(Ok(()), |span| holds_words(call, what, span, count))
}

/// Refuses a span of other than `count` 4-byte cells, or at an odd address.
pub(super) fn fills(
    call: &'static str,
    what: &str,
    span: &Span,
    count: usize,
) -> Result<(), CudaError> {
    if Some(span.bytes()) != count.checked_mul(4) || !span.address().is_multiple_of(4) {
        let problem = format!("{what}: {} bytes for {count} of 4 bytes", span.bytes());
        return Err(CudaError::shape(call, problem));
    }
    Ok(())
}

/// A pointer, null without a span.
pub(super) fn optional(args: Args, span: Option<&Span>) -> Args {
    match span {
        Some(span) => args.span(span),
        None => args.address(0),
    }
}
