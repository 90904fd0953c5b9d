//! The engine on its own thread, so that the window never waits for it.

use super::app::EngineEvent;
use crate::{
    engine::{Engine, Message},
    exit::Failure,
};
use crossbeam::channel::{Sender, unbounded};
use pregate_runtime::Cancel;
use std::{
    any::Any,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    thread,
};

pub const THREAD: &str = "answer";

/// A conversation partner that panics more often than this is given up.
const MAX_PANICS: usize = 3;

enum Task {
    Ask { id: u64, messages: Vec<Message>, cancel: Cancel },
    Reset,
}

pub struct Worker {
    tasks: Sender<Task>,
}

impl Worker {
    /// Starts the thread; `on_event` gets the number of the question and what
    /// happened to it. The thread ends when the worker is dropped.
    pub fn start(
        mut engine: Box<dyn Engine>,
        on_event: impl Fn(u64, EngineEvent) + Send + 'static,
    ) -> io::Result<Self> {
        let (tasks, inbox) = unbounded();
        thread::Builder::new().name(THREAD.to_string()).spawn(move || {
            let mut panics = 0;
            for task in inbox {
                match task {
                    Task::Reset if panics <= MAX_PANICS => engine.reset(),
                    Task::Reset => {}
                    Task::Ask { id, messages, cancel } => {
                        let result = if panics <= MAX_PANICS {
                            let mut pass_on = |event: pregate_runtime::Event<'_>| {
                                on_event(id, EngineEvent::from(event));
                            };
                            catch_unwind(AssertUnwindSafe(|| {
                                engine.answer(&messages, &cancel, &mut pass_on)
                            }))
                            .unwrap_or_else(|payload| {
                                panics += 1;
                                engine.reset();
                                Err(Failure::Internal(panic_text(&*payload)))
                            })
                        } else {
                            Err(Failure::Internal(
                                "the engine failed too often; please start again".to_string(),
                            ))
                        };
                        on_event(id, EngineEvent::Done(result));
                    }
                }
            }
        })?;
        Ok(Self { tasks })
    }

    pub fn ask(&self, id: u64, messages: Vec<Message>, cancel: Cancel) {
        // The thread catches panics, so it is there as long as we are.
        let _ = self.tasks.send(Task::Ask { id, messages, cancel });
    }

    pub fn reset(&self) {
        let _ = self.tasks.send(Task::Reset);
    }
}

fn panic_text(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| text.to_string());
    text.or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_string())
}
