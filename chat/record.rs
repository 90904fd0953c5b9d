//! `--record FILE`: what routers choose goes to a trace file meanwhile.

use crate::{exit::Failure, model, save, streaming::MemoryArgs};
use pregate_predictor::{NoObserver, Observer, Shape};
use pregate_runtime::{Model, store::layout::ModelLayout};
use pregate_traces::{
    Header, Provenance,
    record::{Recorder, Recording},
};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long the end waits for an answer that is being cancelled.
const PATIENCE: Duration = Duration::from_secs(5);

/// A recorder that the engine's thread uses and the command ends.
#[derive(Clone)]
pub struct Record {
    path: PathBuf,
    recorder: Arc<Mutex<Option<Recorder>>>,
}

impl Record {
    /// Creates the file, if one was asked for; over nothing that is read.
    pub fn start(
        path: Option<&Path>,
        model: &Model,
        file: &Path,
        memory: &MemoryArgs,
    ) -> Result<Option<Self>, Failure> {
        let Some(path) = path else { return Ok(None) };
        let header = Header {
            model: model::name(model.description(), file),
            fingerprint: Some(model.fingerprint()?),
            shape: shape(model),
            source: Provenance::Recorded,
        };
        let files = model.files().paths().iter().map(PathBuf::as_path);
        save::refuse_same(path, files, "a file of the model")?;
        let predictor = memory.streaming.predictor.iter().map(|file| file.path.as_path());
        save::refuse_same(path, predictor, "the file of --predictor")?;
        let recorder = Recorder::create(path, &header)?;
        let recorder = Arc::new(Mutex::new(Some(recorder)));
        Ok(Some(Self { path: path.to_path_buf(), recorder }))
    }

    /// Runs `with` the recorder, or with nobody once it has ended.
    pub fn during<T>(record: Option<&Self>, with: impl FnOnce(&mut dyn Observer) -> T) -> T {
        let Some(record) = record else { return with(&mut NoObserver) };
        let mut recorder = record.recorder.lock().unwrap_or_else(|broken| broken.into_inner());
        match &mut *recorder {
            Some(recorder) => with(recorder),
            None => with(&mut NoObserver),
        }
    }

    /// Ends the file, and says on standard error what is in it and what is
    /// not. A disk that failed is a warning: the answer was given.
    pub fn finish(&self) {
        let name = self.path.display();
        let began = Instant::now();
        let recorder = loop {
            match self.recorder.try_lock() {
                Ok(mut recorder) => break recorder.take(),
                Err(_) if began.elapsed() > PATIENCE => break None,
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let Some(recorder) = recorder else {
            eprintln!("warning: {name} has no end: an answer was still being written");
            return;
        };
        let recording = recorder.finish();
        if let Some(error) = &recording.error {
            eprintln!("warning: the recording ended early: {error}");
        }
        missing(&recording).iter().for_each(|text| eprintln!("warning: {text}"));
        eprintln!("recorded {} tokens to {name}", recording.tokens);
    }
}

/// What is not in the file, and why.
fn missing(recording: &Recording) -> Option<String> {
    let (dropped, odd) = (recording.dropped, recording.odd_passes);
    let why = match (dropped.passes, odd) {
        (0, _) => return None,
        (all, odd) if all == odd => "their weights are not finite numbers of 16 bits".to_string(),
        (_, 0) => "the disk was too slow".to_string(),
        (_, odd) => {
            format!("the disk was too slow, and {odd} had weights that are not finite")
        }
    };
    let (passes, tokens) = (dropped.passes, dropped.tokens);
    Some(format!("{passes} passes of {tokens} tokens are missing from the recording: {why}"))
}

/// Of the experts that come and go, else of those in the files.
fn shape(model: &Model) -> Shape {
    if let Some(store) = model.store() {
        return store.layout().shape.clone();
    }
    let top_k = |layer| model.description().top_k(layer);
    ModelLayout::new(model.files(), model.weights(), top_k).shape
}
