//! Checks and arguments that launchers share.

use super::{Args, CudaError, Span};

/// `value` as a kernel's `int`.
pub(super) fn int(call: &'static str, what: &str, value: usize) -> Result<i32, CudaError> {
    i32::try_from(value)
        .map_err(|_| CudaError::shape(call, format!("{what} is {value}, above {}", i32::MAX)))
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

/// [`holds_words`] where there is a span.
pub(super) fn may_hold(
    call: &'static str,
    what: &str,
    span: Option<&Span>,
    count: usize,
) -> Result<(), CudaError> {
    span.map_or(Ok(()), |span| holds_words(call, what, span, count))
}

/// A pointer, null without a span.
pub(super) fn optional(args: Args, span: Option<&Span>) -> Args {
    match span {
        Some(span) => args.span(span),
        None => args.address(0),
    }
}
