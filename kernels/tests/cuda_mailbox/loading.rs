//! What launches need, loaded before; and launches that return while the
//! device waits.

use crate::machine::{DRAINS, Drain, K, Machine, Token, open};
use crate::steps::{Host, run_step};
use pregate_kernels::cuda::{CudaError, Decision, Graph, Span, StepError};
use pregate_kernels::testing::Random;
use std::thread;
use std::time::{Duration, Instant};

/// Launches behind one that waits for the host.
fn crowd(machine: &Machine, none: &Span, count: usize) -> Result<(), CudaError> {
    machine.begin()?;
    machine.post(0)?;
    machine.settle(0)?;
    (0..count).try_for_each(|_| machine.settle_of(0, none))
}

#[test]
fn launches_behind_one_that_waits_return_before_it_is_answered() {
    let Some((standin, lab)) = open(Drain::Lazy) else { return };
    let mut machine = Machine::new(lab, &mut Random::new(31));
    if standin.is_none() {
        // A launch that does not return is told of before the test's time ends.
        machine.patience = Duration::from_secs(4);
    }
    let none = machine.lab.cells(1);
    machine.lab.device.compute().fill(&none, 0).unwrap();
    let stream = machine.lab.device.compute();
    // As one graph; one by one, fewer than a driver's queue has room for: the
    // runtime gives it two layers.
    let many = if standin.is_some() { 100 } else { 4000 };
    let graph = Graph::capture(stream, || crowd(&machine, &none, many)).unwrap();
    let token = Token::random(&mut Random::new(32));
    for (step, count) in [(1, None), (2, Some(many.min(200))), (3, None)] {
        machine.prepare(step, &token, &[]);
        let started = Instant::now();
        match count {
            None => graph.launch(stream).unwrap(),
            Some(count) => crowd(&machine, &none, count).unwrap(),
        }
        let took = started.elapsed();
        let error = StepError::read(&machine.error, 0);
        assert_eq!(error, None, "step {step}: the launch took {took:?}, until nobody waited");
        assert!(took < Duration::from_secs(2), "step {step}: {took:?}");
        Decision::give_up(&machine.decisions, 0..K, step);
        stream.synchronize().unwrap();
        assert_eq!(StepError::read(&machine.error, 0), None, "step {step}");
    }
}

#[test]
fn kernels_that_were_rehearsed_are_not_loaded_when_they_are_launched() {
    for drain in DRAINS {
        let Some((Some(standin), lab)) = open(drain) else { return };
        let calls = || {
            let names = ["cuModuleLoadDataEx", "cuModuleGetFunction", "cuFuncLoad"];
            names.map(|name| standin.calls_of(name))
        };
        let machine = Machine::new(lab, &mut Random::new(33));
        let (before, launches) = (calls(), standin.count("launches"));
        assert!(before[0] >= 1 && before[1] == before[2] && before[2] >= 5, "{before:?}");
        let mut host = Host::new(&machine, 34);
        (1..=3).for_each(|step| run_step(&machine, None, &mut host, step, false));
        assert_eq!(calls(), before, "{drain:?}");
        let stream = machine.lab.device.compute();
        // Only launches, only of this thread, and nothing runs.
        let launched = standin.count("launches");
        assert!(launched > launches);
        stream.rehearse(|| machine.launch()).unwrap();
        let copied = stream.rehearse(|| stream.fill(&machine.slot_of, 0));
        assert!(matches!(copied, Err(CudaError::Shape { .. })), "{copied:?}");
        let nested = stream.rehearse(|| stream.rehearse(|| machine.launch()));
        assert!(matches!(nested, Err(CudaError::Shape { .. })), "{nested:?}");
        stream.synchronize().unwrap();
        assert_eq!(standin.count("launches"), launched, "{drain:?}");
        let scratch = machine.lab.cells(1);
        let fill = || thread::scope(|scope| scope.spawn(|| stream.fill(&scratch, 7)).join());
        stream.rehearse(|| fill().unwrap()).unwrap();
        assert_eq!(machine.lab.read_ints(&scratch), [0x0707_0707], "of another thread");
        run_step(&machine, None, &mut host, 4, false);
        assert_eq!(standin.violations(), Vec::<String>::new(), "{drain:?}");
    }
}
