//! What callers get wrong is refused before the driver sees it.

use crate::machine::{Drain, K, Machine, open};
use pregate_kernels::cuda::{
    AheadLogits, BeginStep, Combine, CudaError, Decision, ExpertArena, HostRows, MOST_CHOICES,
    MailboxLayout, Post, Settle, Span, StepError, StepLayout, begin_step, combine, post, settle,
};
use pregate_kernels::testing::Random;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

#[track_caller]
fn refused(result: Result<(), CudaError>, about: &str) {
    let error = result.expect_err(about);
    assert!(matches!(error, CudaError::Shape { .. }), "{error}");
    assert!(error.to_string().contains(about), "{about:?} is not in {error}");
}

fn short(span: &Span) -> Span {
    span.part(0..span.bytes() - 1)
}

#[test]
fn steps_that_do_not_fit_are_refused() {
    let Some((_standin, lab)) = open(Drain::Lazy) else { return };
    let layout = StepLayout { updates: 4, input_bytes: 40 };
    let block = lab.device.mapped(layout.bytes()).unwrap();
    for (step, position, updates) in [(0, 0, 0), (1, 1 << 31, 0), (1, usize::MAX, 0), (1, 0, 5)] {
        let updates = vec![(0, 0); updates];
        refused(layout.write(&block, step, position, &updates), "room for 4");
    }
    let mut bytes = vec![1; layout.bytes()];
    block.read(0..layout.bytes(), &mut bytes);
    assert!(bytes.iter().all(|byte| *byte == 0), "nothing was written");

    let (slots, words, inputs, mapped) = (lab.zeros(8), lab.cells(4), lab.space(40), block.span());
    let call = |layout, block: &Span, words: &Span, inputs: &Span| {
        let call = BeginStep { layout, block, slot_of: &slots, words, inputs };
        begin_step(&lab.device, lab.device.compute(), call)
    };
    refused(call(layout, &short(&mapped), &words, &inputs), "step block");
    refused(call(layout, &mapped, &short(&words), &inputs), "step words");
    refused(call(layout, &mapped, &words, &short(&inputs)), "inputs");
    let odd = StepLayout { updates: 4, input_bytes: 39 };
    refused(call(odd, &mapped, &words, &inputs), "39 bytes");
    call(layout, &mapped, &words, &inputs).unwrap();
    lab.device.compute().synchronize().unwrap();
}

/// Everything that `post` and `settle` take, of the right sizes.
struct Spans {
    layout: MailboxLayout,
    mailbox: Span,
    words: Span,
    ids: Span,
    weights: Span,
    slots: Span,
    arena: Span,
    table: Span,
    mask: Span,
    logits: Span,
    x: Span,
    decisions: Span,
    error: Span,
}

impl Spans {
    fn new(lab: &crate::lab::Lab) -> Self {
        let layout = MailboxLayout { k: 3, hidden: 20, ahead: 2, experts: 6 };
        let mapped = |bytes: usize| lab.device.mapped(bytes).unwrap().span();
        Self {
            layout,
            mailbox: mapped(layout.bytes()),
            words: lab.ints(&[1, 0, 0, 0]),
            ids: lab.ints(&[0, 1, 2]),
            weights: lab.floats(&[1.0; 3]),
            slots: lab.ints(&[1; 6]),
            arena: lab.zeros(2048),
            table: lab.zeros(48),
            mask: lab.zeros(4),
            logits: lab.floats(&[0.0; 8 + 6]),
            x: lab.floats(&[0.0; 20]),
            decisions: mapped(24),
            error: mapped(8),
        }
    }

    fn post(&self) -> Post<'_> {
        Post {
            layout: self.layout,
            mailbox: &self.mailbox,
            words: &self.words,
            ids: &self.ids,
            weights: &self.weights,
            slot_of: &self.slots,
            arena: ExpertArena { span: &self.arena, block_bytes: 512 },
            table: &self.table,
            missing: &self.mask,
            ahead: Some(AheadLogits { logits: &self.logits, pitch: 8 }),
            x: &self.x,
        }
    }

    fn settle(&self) -> Settle<'_> {
        Settle {
            words: &self.words,
            missing: &self.mask,
            ids: &self.ids,
            k: 3,
            decisions: &self.decisions,
            arena: ExpertArena { span: &self.arena, block_bytes: 512 },
            patience: Duration::from_secs(1),
            error: &self.error,
            late: &self.table,
            from_host: &self.mask,
        }
    }
}

#[test]
fn posts_that_do_not_fit_are_refused() {
    let Some((_standin, lab)) = open(Drain::Lazy) else { return };
    let spans = Spans::new(&lab);
    let run = |call: Post<'_>| post(&lab.device, lab.device.compute(), call);
    let MailboxLayout { .. } = spans.layout;
    for k in [0, MOST_CHOICES + 1] {
        let layout = MailboxLayout { k, ..spans.layout };
        refused(run(Post { layout, ..spans.post() }), "choices");
    }
    refused(run(Post { mailbox: &short(&spans.mailbox), ..spans.post() }), "mailbox");
    refused(run(Post { words: &short(&spans.words), ..spans.post() }), "step words");
    refused(run(Post { ids: &short(&spans.ids), ..spans.post() }), "ids");
    refused(run(Post { weights: &short(&spans.weights), ..spans.post() }), "weights");
    refused(run(Post { table: &short(&spans.table), ..spans.post() }), "table");
    refused(run(Post { missing: &short(&spans.mask), ..spans.post() }), "mask");
    refused(run(Post { x: &short(&spans.x), ..spans.post() }), "x");
    refused(run(Post { ahead: None, ..spans.post() }), "2 layers ahead");
    let ahead = Some(AheadLogits { logits: &spans.logits, pitch: 5 });
    refused(run(Post { ahead, ..spans.post() }), "5 apart");
    let logits = short(&spans.logits);
    let ahead = Some(AheadLogits { logits: &logits, pitch: 8 });
    refused(run(Post { ahead, ..spans.post() }), "logits");
    let odd = spans.arena.part(128..2048);
    let arena = ExpertArena { span: &odd, block_bytes: 512 };
    refused(run(Post { arena, ..spans.post() }), "arena");
    run(spans.post()).unwrap();
    lab.device.compute().synchronize().unwrap();
    assert_eq!(lab.read_ints(&spans.mask), [0]);
    // An arena that is shorter than a block is a small GPU's.
    let arena = ExpertArena { span: &spans.arena, block_bytes: 2049 };
    run(Post { arena, ..spans.post() }).unwrap();
    assert_eq!(lab.read_ints(&spans.mask), [7]);
    let nowhere = spans.arena.part(0..0);
    let arena = ExpertArena { span: &nowhere, block_bytes: 512 };
    run(Post { arena, ..spans.post() }).unwrap();
    assert_eq!(lab.read_ints(&spans.mask), [7]);
    lab.device.compute().synchronize().unwrap();
}

#[test]
fn settlements_that_do_not_fit_are_refused() {
    let Some((_standin, lab)) = open(Drain::Lazy) else { return };
    let spans = Spans::new(&lab);
    let run = |call: Settle<'_>| settle(&lab.device, lab.device.compute(), call);
    for k in [0, MOST_CHOICES + 1] {
        refused(run(Settle { k, ..spans.settle() }), "choices");
    }
    refused(run(Settle { words: &short(&spans.words), ..spans.settle() }), "step words");
    refused(run(Settle { missing: &short(&spans.mask), ..spans.settle() }), "mask");
    refused(run(Settle { ids: &short(&spans.ids), ..spans.settle() }), "ids");
    refused(run(Settle { decisions: &short(&spans.decisions), ..spans.settle() }), "decisions");
    refused(run(Settle { error: &short(&spans.error), ..spans.settle() }), "error");
    refused(run(Settle { from_host: &short(&spans.mask), ..spans.settle() }), "host's choices");
    run(spans.settle()).unwrap();
    lab.device.compute().synchronize().unwrap();
}

#[test]
fn rows_of_the_host_are_those_of_one_token() {
    let Some((_standin, lab)) = open(Drain::Lazy) else { return };
    let rows = lab.device.mapped(4 * 2 * 33 * 4).unwrap().span();
    let floats = |count: usize| lab.floats(&vec![0.0; count]);
    let mask = lab.zeros(4);
    let run = |tokens: usize, k: usize, rows: &Span, from_host: &Span| {
        let call = Combine {
            tokens,
            k,
            hidden: 4,
            answers: &floats(tokens * k * 4),
            weights: &floats(tokens * k),
            shared: None,
            residual: None,
            out: Some(&floats(tokens * 4)),
            host: Some(HostRows { rows, from_host }),
        };
        combine(&lab.device, lab.device.compute(), call)
    };
    refused(run(2, 3, &rows, &mask), "2 tokens");
    refused(run(1, 33, &rows, &mask), "33 choices");
    refused(run(1, 3, &rows.part(0..47), &mask), "rows");
    refused(run(1, 3, &rows, &short(&mask)), "host's choices");
    run(1, 3, &rows, &mask).unwrap();
    lab.device.compute().synchronize().unwrap();
}

#[test]
fn layouts_are_lines_apart_and_words_are_read_as_they_were_told() {
    let Some((_standin, lab)) = open(Drain::Lazy) else { return };
    let machine = Machine::new(lab, &mut Random::new(1));
    assert!(machine.mailbox.bytes().is_multiple_of(128));
    assert!(machine.step.inputs_at().is_multiple_of(128));
    assert_eq!(ExpertArena::entry(0), Some(1));
    assert_eq!(ExpertArena::entry(512), Some(3));
    assert_eq!(ExpertArena::entry(100), None);
    assert_eq!(ExpertArena::entry(usize::MAX / 256 * 256), None);
    for (decision, value) in [(Decision::Host, 1), (Decision::Resident(1), 2)] {
        decision.tell(&machine.decisions, K, 9);
        assert_eq!(machine.decisions.load_acquire(K), 9 << 32 | value);
    }
    let wrong = || Decision::Resident(0).tell(&machine.decisions, 0, 9);
    assert!(catch_unwind(AssertUnwindSafe(wrong)).is_err());
    for (word, wanted) in [
        (0, None),
        (9 << 32 | 1, Some(StepError::Late { step: 9 })),
        (9 << 32 | 2, Some(StepError::BadEntry { step: 9 })),
        (9 << 32 | 3, Some(StepError::Unknown { word: 9 << 32 | 3 })),
        (9 << 32, Some(StepError::Unknown { word: 9 << 32 })),
    ] {
        machine.error.store_release(0, word);
        assert_eq!(StepError::read(&machine.error, 0), wanted);
    }
    // No mailbox there.
    let mut posted = machine.mailbox.posted();
    for at in [4, 1 << 20] {
        let read =
            AssertUnwindSafe(|| machine.mailbox.read(&machine.mailboxes, at, 1, &mut posted));
        assert!(catch_unwind(read).is_err());
    }
}
