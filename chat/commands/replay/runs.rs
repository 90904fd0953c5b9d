//! All settings that were asked for, replayed side by side on the machine's
//! cores.

use super::{
    args::{ReplayArgs, SlotsArg, WarmArg},
    room::Room,
    subject::Subject,
};
use crate::{exit::Failure, progress::Progress};
use pregate_predictor::{
    Scope,
    forecast::{Forecaster, LEARNED, learned::Trained},
    policy,
};
use pregate_traces::{
    Source,
    replay::{Bracket, Machine, Options, ReplayError, Report, Warm, replay_with},
};
use std::{
    collections::{HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

/// One setting, by its places in what was asked for.
#[derive(Clone, Debug)]
pub struct Job {
    pub trace: usize,
    pub machine: usize,
    pub size: usize,
    pub policy: usize,
    pub forecast: usize,
    /// Per layer of the model.
    slots: Vec<usize>,
    /// Slots of each layer that the machine has memory for.
    pub most: usize,
    options: Options,
}

impl Run {
    /// Whether the machine has memory for so many slots.
    pub fn fits(&self) -> bool {
        self.report.slots_per_layer <= self.job.most
    }
}

/// A setting and what it led to.
#[derive(Clone, Debug)]
pub struct Run {
    pub job: Job,
    pub report: Report,
    /// What is missing from the trace.
    pub notice: Option<String>,
}

/// What was asked for.
pub struct Asked {
    pub subjects: Vec<Subject>,
    pub machines: Vec<Machine>,
    pub sizes: Vec<SlotsArg>,
    /// Or else chosen by us.
    sizes_are_asked: bool,
    pub policies: Vec<String>,
    pub forecasts: Vec<String>,
    /// What was trained for the model of the traces.
    pub predictor: Option<Arc<Trained>>,
    horizon: usize,
    pub context: u64,
    pub warm: Option<WarmArg>,
}

impl Asked {
    pub fn new(args: &ReplayArgs, subjects: Vec<Subject>, machines: Vec<Machine>) -> Self {
        Self {
            subjects,
            machines,
            sizes: args.sizes(),
            sizes_are_asked: !args.slots.is_empty(),
            policies: args.policies(),
            forecasts: args.forecasts(),
            predictor: args.predictor.as_ref().map(|file| file.trained.clone()),
            horizon: args.horizon,
            context: args.context,
            warm: args.warm,
        }
    }

    /// Whether what was trained is there, and for these traces' models.
    ///
    /// # Errors
    /// Says which forecast or trace does not fit.
    pub fn check_predictor(&self) -> Result<(), Failure> {
        let Some(trained) = &self.predictor else {
            let asked = self.forecasts.iter().find(|name| LEARNED.contains(&name.as_str()));
            return asked.map_or(Ok(()), |name| {
                let what = "is in a file that pregate train-predictor writes: name it with";
                Err(Failure::Usage(format!("--forecast {name}: {what} --predictor FILE")))
            });
        };
        for Subject { name, header, .. } in &self.subjects {
            trained
                .check(&header.shape, header.fingerprint.as_ref())
                .map_err(|error| Failure::Usage(format!("--predictor, for {name}: {error}")))?;
        }
        Ok(())
    }

    /// `None`: nothing is forecast.
    fn forecaster(&self, job: &Job) -> Result<Option<Forecaster>, Failure> {
        let (name, horizon) = (&self.forecasts[job.forecast], job.options.horizon);
        let shape = &self.subjects[job.trace].header.shape;
        if name == "none" {
            return Ok(None);
        }
        let forecaster = match &self.predictor {
            Some(trained) => Forecaster::by_name_with(name, shape, horizon, trained),
            None => Forecaster::by_name(name, shape, horizon),
        };
        let unknown = || format!("--forecast {name}: not in the file of --predictor");
        forecaster.map(Some).ok_or_else(|| Failure::Usage(unknown()))
    }

    /// Every combination, in the order in which they are told.
    fn jobs(&self) -> Result<Vec<Job>, Failure> {
        let mut jobs: Vec<Job> = Vec::new();
        let mut counted = HashSet::new();
        for (trace, subject) in self.subjects.iter().enumerate() {
            for (machine, on) in self.machines.iter().enumerate() {
                let mut seen = HashSet::new();
                for (size, slots) in self.sizes.iter().enumerate() {
                    let room = Room::of(on, subject, slots, self.context)?;
                    let slots = room.slots.per_layer(&subject.header.shape);
                    // Of the sizes that we chose some may be the same.
                    if !seen.insert(slots.clone()) && !self.sizes_are_asked {
                        continue;
                    }
                    for (policy, policy_name) in self.policies.iter().enumerate() {
                        for (forecast, forecast_name) in self.forecasts.iter().enumerate() {
                            let options = Options {
                                trace: subject.name.clone(),
                                slots: room.slots.clone(),
                                policy: policy_name.clone(),
                                forecast: forecast_name.clone(),
                                horizon: self.horizon,
                                warm: self.warm(subject),
                                dense_bytes: self.dense_bytes(subject),
                                ram_share: room.ram_share,
                                bracket: counted.insert(self.bracket_key(
                                    trace,
                                    &slots,
                                    policy_name,
                                )),
                                ..Options::default()
                            };
                            let slots = slots.clone();
                            jobs.push(Job {
                                trace,
                                machine,
                                size,
                                policy,
                                forecast,
                                slots,
                                most: room.most,
                                options,
                            });
                        }
                    }
                }
            }
        }
        Ok(jobs)
    }

    /// Everything but routed experts that a token reads: of the cache, which
    /// fills, half.
    fn dense_bytes(&self, subject: &Subject) -> u64 {
        let weights = &subject.weights;
        weights.other_bytes.unwrap_or(0) + self.context / 2 * weights.kv_bytes
    }

    pub fn warm(&self, subject: &Subject) -> Warm {
        let tokens = match self.warm {
            None => 0,
            Some(WarmArg::Tokens(tokens)) => tokens,
            Some(WarmArg::Tenth) => subject.tokens / 10,
            Some(WarmArg::Whole) => return Warm::Whole,
        };
        if tokens == 0 { Warm::Cold } else { Warm::Tokens(tokens) }
    }
}

/// What LRU's and Belady's hits depend on: the trace, the slots, and whether
/// layers share them. They are counted for one setting of each.
type BracketKey = (usize, Vec<usize>, bool);

impl Asked {
    fn bracket_key(&self, trace: usize, slots: &[usize], policy: &str) -> BracketKey {
        let shape = &self.subjects[trace].header.shape;
        let shares = policy::by_name(policy).is_some_and(|mut policy| {
            policy.prepare(shape, slots);
            policy.scope() == Scope::Pool
        });
        (trace, slots.to_vec(), shares)
    }
}

/// How often the bar is drawn.
const LOOK: Duration = Duration::from_millis(100);

/// Replays everything; the order of the answers does not depend on who ends
/// first. A bar on standard error shows tokens and their rate.
pub fn all(asked: &Asked) -> Result<Vec<Run>, Failure> {
    let jobs = asked.jobs()?;
    let tokens = jobs.iter().map(|job| asked.subjects[job.trace].passes_over(job.options.warm));
    let tokens = tokens.fold(0, u64::saturating_add);
    let mut bar = Progress::with_rate("replaying", "tokens", Some(tokens));
    let shared = Shared {
        next: AtomicUsize::new(0),
        tokens: AtomicU64::new(0),
        failed: AtomicBool::new(false),
        answers: jobs.iter().map(|_| Mutex::new(None)).collect(),
    };
    let cores = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let work = || scope.spawn(|| shared.work(asked, &jobs));
        let workers: Vec<_> = (0..cores.min(jobs.len())).map(|_| work()).collect();
        while !workers.iter().all(thread::ScopedJoinHandle::is_finished) {
            thread::park_timeout(LOOK);
            bar.set(usize::try_from(shared.tokens.load(Ordering::Relaxed)).unwrap_or(0));
        }
    });
    drop(bar);
    let answers = shared.answers.into_iter().zip(jobs);
    // Behind a failure others may be missing; the first in order is told.
    let answers = answers.filter_map(|(answer, job)| {
        let answer = answer.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        Some(answer?.map(|(report, notice)| Run { job, report, notice }))
    });
    let mut runs = answers.collect::<Result<Vec<Run>, Failure>>()?;
    share_brackets(asked, &mut runs);
    Ok(runs)
}

/// Gives every run the bracket that one of its kind has.
fn share_brackets(asked: &Asked, runs: &mut [Run]) {
    let key = |run: &Run| {
        asked.bracket_key(run.job.trace, &run.job.slots, &asked.policies[run.job.policy])
    };
    let counted: HashMap<BracketKey, Bracket> =
        runs.iter().filter_map(|run| Some((key(run), run.report.bracket?))).collect();
    for run in runs {
        let found = counted.get(&key(run));
        run.report.bracket = found.map(|found| Bracket { this_hits: run.report.hits, ..*found });
    }
}

/// With what the trace said of itself.
type Answer = (Report, Option<String>);

struct Shared {
    next: AtomicUsize,
    tokens: AtomicU64,
    failed: AtomicBool,
    answers: Vec<Mutex<Option<Result<Answer, Failure>>>>,
}

impl Shared {
    /// Takes one setting after the other until none is left or one failed.
    fn work(&self, asked: &Asked, jobs: &[Job]) {
        while !self.failed.load(Ordering::Relaxed) {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            let Some(job) = jobs.get(index) else { return };
            let answer = self.one(asked, job);
            if answer.is_err() {
                self.failed.store(true, Ordering::Relaxed);
            }
            if let Ok(mut place) = self.answers[index].lock() {
                *place = Some(answer);
            }
        }
    }

    fn one(&self, asked: &Asked, job: &Job) -> Result<Answer, Failure> {
        let subject = &asked.subjects[job.trace];
        let mut source = subject.open()?;
        let mut told = 0;
        let mut progress = |tokens: u64| {
            self.tokens.fetch_add(tokens - told, Ordering::Relaxed);
            told = tokens;
        };
        let machine = &asked.machines[job.machine];
        let tables = asked.predictor.as_ref().and_then(|trained| trained.value.as_ref());
        let policy = policy::by_name_with(&asked.policies[job.policy], tables)
            .ok_or_else(|| Failure::Internal("a policy without a name".to_string()))?;
        let forecaster = asked.forecaster(job)?;
        let options = &job.options;
        let report = replay_with(&mut source, machine, options, policy, forecaster, &mut progress);
        report.map(|report| (report, source.notice())).map_err(|error| match error {
            ReplayError::Trace(error) => error.into(),
            ReplayError::Empty => {
                let words = "there are no tokens to count: fewer for --warm, or another trace";
                Failure::Usage(format!("{}: {words}", subject.name))
            }
            other => Failure::Usage(format!("{}: {other}", subject.name)),
        })
    }
}
