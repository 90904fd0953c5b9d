//! A layer whose experts are not all on the device: the host learns what its
//! router chose, computes some of the missing experts, and has others copied
//! while the device computes those that are there. All have the same bits.

use super::decider::HostWork;
use super::exchange::Chosen;
use super::host_rows::HostRows;
use super::moving::Moving;
use super::pass::{Companions, Pass, words};
use super::weights::DeviceMoe;
use crate::error::Result;
use crate::forward::Work;
use crate::session::Cancel;
use crate::store::{Arrived, Event, Missing};
use pregate_kernels::cuda::{self, CudaError, HostPart, Span};
use pregate_kernels::{Choice, Grouping, Routes};

/// A layer's choices, once they are made.
pub struct Visit<'a> {
    pass: &'a Pass<'a>,
    layer: usize,
    moe: &'a DeviceMoe,
    chosen: &'a Chosen,
    ready: cuda::Event,
}

impl<'a> Visit<'a> {
    /// To be called behind the layer's norm and router.
    pub fn new(
        pass: &'a Pass<'a>,
        layer: usize,
        moe: &'a DeviceMoe,
        chosen: &'a Chosen,
    ) -> Result<Self, CudaError> {
        Ok(Self { pass, layer, moe, chosen, ready: pass.stream().record()? })
    }

    /// Fills `answers`, `[tokens, k, hidden]`. `launch` launches the experts
    /// that have an address in a table, u64 `[experts]`, and leaves the rows of
    /// the others as they are.
    pub fn run(
        self,
        companions: &mut Companions<'_, '_>,
        answers: &Span,
        launch: &dyn Fn(&Span) -> Result<(), CudaError>,
    ) -> Result<()> {
        companions.meter.lap(Work::Dense);
        let Self { pass, moe, .. } = &self;
        pass.device().visits().wait(&self.ready)?;
        let routes = self.routes()?;
        let mut grouping = Grouping::default();
        grouping.gather(&routes);
        // A token's: the most important first.
        let order: Vec<u32> = match pass.tokens {
            1 => routes.of(0).iter().map(|choice| choice.expert).collect(),
            _ => grouping.experts().collect(),
        };
        let moving = pass.model.moving();
        let mut event = moving.map(|moving| self.begin(moving, &order, &routes));
        let left: Vec<u32> = match &event {
            Some(event) => event.left().iter().map(|id| id.expert).collect(),
            None => {
                order.iter().copied().filter(|&id| !moe.experts.is_fixed(id as usize)).collect()
            }
        };
        let first = match &mut event {
            Some(event) if event.has_ready() => event.next(companions.cancel)?,
            _ => Vec::new(),
        };
        companions.meter.lap(Work::Overhead);
        if !first.is_empty() || order.iter().any(|&id| moe.experts.is_fixed(id as usize)) {
            launch(&self.table(companions, true, &first)?)?;
            self.launched(&first)?;
        }
        drop(first);
        let cancel = companions.cancel;
        let (mut work, waited_ns) =
            self.compute(&routes, &left, answers, (event.as_mut(), cancel))?;
        if let Some(event) = &event {
            work.ns = (event.now_ns() - event.began_ns()).saturating_sub(waited_ns);
            work.busy_ns = event.link_busy_ns();
        }
        companions.meter.lap(Work::Experts);
        if let Some((event, moving)) = event.zip(moving) {
            self.receive(event, moving, work, companions, launch)?;
        }
        Ok(())
    }

    /// Asks for what is not there, and decides who computes it.
    fn begin(&self, moving: &'a Moving, order: &[u32], routes: &Routes) -> Event<'a> {
        let Self { pass, layer, moe, .. } = self;
        let decider = moving.decider();
        let mut counts = vec![0; moe.experts.count];
        routes.all().iter().for_each(|choice| counts[choice.expert as usize] += 1);
        let mut leave = |missing: Missing<'_>| match pass.tokens {
            1 => decider.of_token(missing, false),
            _ => decider.of_chunk(missing, |expert| counts[expert as usize]),
        };
        moving.store().begin_shared(*layer, order, routes, &mut leave)
    }

    /// Launches what arrives, and ends the event.
    fn receive(
        &self,
        mut event: Event<'_>,
        moving: &Moving,
        work: HostWork,
        companions: &mut Companions<'_, '_>,
        launch: &dyn Fn(&Span) -> Result<(), CudaError>,
    ) -> Result<()> {
        loop {
            let before = event.waited_ns();
            let arrived = event.next(companions.cancel)?;
            companions.meter.lap_with_wait(Work::Overhead, event.waited_ns() - before);
            if arrived.is_empty() {
                break;
            }
            launch(&self.table(companions, false, &arrived)?)?;
            self.launched(&arrived)?;
        }
        let Pass { first_position, tokens, .. } = *self.pass;
        moving.decider().ended(&mut event, work, tokens);
        event.finish(first_position, tokens, companions.observer);
        companions.meter.lap(Work::Overhead);
        Ok(())
    }

    /// Experts were given to the device, which reads their frames from now on.
    fn launched(&self, experts: &[Arrived]) -> Result<(), CudaError> {
        let Some(moving) = self.pass.model.moving().filter(|_| !experts.is_empty()) else {
            return Ok(());
        };
        moving.launched(experts.iter().map(Arrived::frame), self.pass.stream().record()?);
        Ok(())
    }

    /// What each token's router chose.
    fn routes(&self) -> Result<Routes, CudaError> {
        let (visits, k) = (self.pass.device().visits(), self.moe.top_k);
        let count = self.pass.tokens * k;
        let ids = words(visits, &self.chosen.ids, count)?.map(u32::from_ne_bytes);
        let weights = words(visits, &self.chosen.weights, count)?.map(f32::from_ne_bytes);
        let choice = |(expert, weight)| Choice { expert, weight };
        let choices: Vec<Choice> = ids.zip(weights).map(choice).collect();
        let mut routes = Routes::new();
        choices.chunks(k).for_each(|choices| routes.push(choices));
        Ok(routes)
    }

    /// Where `arrived`, and if `fixed` those that never leave, are: u64
    /// `[experts]`, 0 for all others.
    fn table(
        &self,
        companions: &mut Companions<'_, '_>,
        fixed: bool,
        arrived: &[Arrived],
    ) -> Result<Span, CudaError> {
        let experts = &self.moe.experts;
        let moving = match self.pass.model.moving() {
            Some(moving) if !(fixed && arrived.is_empty()) => moving,
            _ => return Ok(experts.table.clone()),
        };
        let of = |expert: usize| if fixed { experts.address(expert) } else { 0 };
        let mut addresses: Vec<u64> = (0..experts.count).map(of).collect();
        for expert in arrived {
            addresses[expert.expert as usize] = moving.address(expert.frame());
        }
        let bytes: Vec<u8> = addresses.into_iter().flat_map(u64::to_ne_bytes).collect();
        let table = self.pass.buffers.table.part(0..bytes.len());
        let bytes = HostPart::Pageable(bytes.into());
        companions.sent.push(self.pass.stream().copy_in(bytes, 0..table.bytes(), &table)?);
        Ok(table)
    }

    /// The host computes the experts `left`. Work of the device that was
    /// launched before runs meanwhile. What it did, and the time that it waited
    /// for reads.
    fn compute(
        &self,
        routes: &Routes,
        left: &[u32],
        answers: &Span,
        (event, cancel): (Option<&mut Event<'_>>, &Cancel),
    ) -> Result<(HostWork, u64)> {
        if left.is_empty() {
            return Ok((HostWork::default(), 0));
        }
        let Self { pass, moe, .. } = self;
        let (k, hidden) = (moe.top_k, pass.description.hidden);
        let (mut choices, mut rows) = (Routes::new(), Vec::new());
        for token in 0..routes.tokens() {
            let all = routes.of(token).iter().enumerate();
            let (at, of): (Vec<usize>, Vec<Choice>) =
                all.filter(|(_, choice)| left.contains(&choice.expert)).unzip();
            choices.push(&of);
            rows.extend(at.into_iter().map(|choice| token * k + choice));
        }
        let visits = pass.device().visits();
        let x = words(visits, &pass.buffers.normed, pass.tokens * hidden)?.map(f32::from_ne_bytes);
        let x: Vec<f32> = x.collect();
        let mut grouping = Grouping::default();
        grouping.gather(&choices);
        let mut found = vec![0.0; grouping.rows() * hidden];
        let (layer, tokens, grouping) = (self.layer, pass.tokens, &grouping);
        let host = HostRows { pass, layer, moe, x: &x, tokens, grouping, cancel };
        let waited_ns = host.compute(&mut found, event)?;
        send(pass, &rows, grouping, &found, answers)?;
        let work = HostWork { experts: left.len(), tokens: rows.len(), ..HostWork::default() };
        Ok((work, waited_ns))
    }
}

/// Copies the rows of the missing choices, whose places are `rows`, to the
/// device, neighbours at once, and waits for all of them together.
fn send(
    pass: &Pass<'_>,
    rows: &[usize],
    grouping: &Grouping,
    found: &[f32],
    answers: &Span,
) -> Result<(), CudaError> {
    let hidden = pass.description.hidden;
    let in_order = (0..rows.len()).flat_map(|index| {
        let from = grouping.row_of(index) * hidden;
        found[from..from + hidden].iter().flat_map(|value| value.to_ne_bytes())
    });
    let bytes = HostPart::Pageable(in_order.collect());
    let (row_bytes, mut first) = (4 * hidden, 0);
    let mut sent = Vec::new();
    for run in rows.chunk_by(|row, next| row + 1 == *next) {
        let (start, range) =
            (row_bytes * run[0], first * row_bytes..(first + run.len()) * row_bytes);
        let span = answers.part(start..start + range.len());
        sent.push(pass.device().visits().copy_in(bytes.clone(), range, &span)?);
        first += run.len();
    }
    for copy in sent {
        copy.wait()?;
    }
    Ok(())
}
