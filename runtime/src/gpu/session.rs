//! One sequence on a device: its cache, and passes over its tokens.

use super::GpuModel;
use super::alone::{NoToken, Token};
use super::buffers::{Buffers, pass_tokens};
use super::exchange::Exchange;
use super::feed_forward;
use super::network::{head, launch, launch_token, tell};
use super::pass::{Companions, Pass, read_floats};
use super::serve::Service;
use super::state::{self, SequenceState};
use super::token::{Graphs, Step, TokenPath};
use super::weights::DeviceLayer;
use crate::error::{Error, Result};
use crate::forward::cache::KvFormat;
use crate::forward::{Meter, check_finite, embed};
use crate::model::Model;
use crate::model::description::ModelDescription;
use crate::model::rope::Rope;
use crate::session::{Cancel, SessionOptions};
use crate::store::PassInfo;
use pregate_kernels::cuda::{CudaError, Device, Entered};
use pregate_predictor::{Fed, Observer};

/// What a pass is asked for.
#[derive(Clone, Copy)]
pub struct GpuPass<'a> {
    /// Every id is below the vocabulary's size.
    pub ids: &'a [u32],
    /// Of the first id; all positions fit the cache.
    pub first_position: usize,
    /// Logits of so many of the last ids.
    pub wanted: usize,
    /// A number of the session's own.
    pub session: u64,
    /// What observers are told of it.
    pub is_prompt: bool,
}

/// A sequence's memory on a device.
pub struct GpuSession {
    buffers: Buffers,
    exchange: Exchange,
    state: SequenceState,
    capacity: usize,
    /// Tokens of a pass, at most.
    pass_tokens: usize,
    /// `[wanted, vocab]` of the last pass that wanted any.
    logits: Vec<f32>,
    /// Recurrent state is to be cleared.
    is_new: bool,
    inputs: Inputs,
    /// Tokens that the device computes by itself.
    token: Result<Token, NoToken>,
    device: Device,
    /// Held while all fields above are dropped.
    leaving: Option<Entered>,
}

/// What every pass of a call goes through.
#[derive(Clone, Copy)]
struct On<'a> {
    model: &'a Model,
    gpu: &'a GpuModel,
    ropes: &'a [Rope],
}

impl<'a> On<'a> {
    /// Over the tokens of `asked`.
    fn pass(
        self,
        (buffers, exchange): (&'a Buffers, &'a Exchange),
        asked: &GpuPass<'_>,
        step: Option<Step<'a>>,
    ) -> Pass<'a> {
        Pass {
            model: self.gpu,
            engine: self.model.engine(),
            description: self.model.description(),
            buffers,
            exchange,
            ropes: self.ropes,
            tokens: asked.ids.len(),
            first_position: asked.first_position,
            step,
        }
    }
}

/// What the host gives a pass, and what of; kept from pass to pass.
#[derive(Default)]
struct Inputs {
    bytes: Vec<u8>,
    embedded: Vec<f32>,
    rope_table: Vec<[f32; 2]>,
    /// Room for logits as they come.
    logits: Vec<u8>,
}

impl Inputs {
    /// Embedded tokens and rotations.
    fn fill(
        &mut self,
        On { model, ropes, .. }: On<'_>,
        exchange: &Exchange,
        GpuPass { ids, first_position, .. }: GpuPass<'_>,
    ) -> Result<()> {
        let Self { bytes, embedded, rope_table, .. } = self;
        embedded.resize(ids.len() * model.description().hidden, 0.0);
        embed(model.engine(), ids, embedded)?;
        exchange.fill((embedded, ids.len()), (ropes, first_position), rope_table, bytes);
        Ok(())
    }
}

impl GpuSession {
    /// Bytes of what a sequence of up to `capacity` positions leaves.
    pub fn state_bytes(description: &ModelDescription, capacity: usize, kv: KvFormat) -> usize {
        state::bytes(description, capacity, kv)
    }

    /// Bytes of what a sequence has besides where not all experts stay on the
    /// device: there the host may be late for a token.
    pub fn copy_bytes(description: &ModelDescription) -> usize {
        state::recurrent_bytes(description)
    }

    /// Bytes of what passes over up to `tokens` tokens use.
    pub fn scratch_bytes(description: &ModelDescription, capacity: usize, tokens: usize) -> usize {
        Buffers::bytes(description, capacity, tokens) + Self::exchange_bytes(description, tokens)
    }

    fn exchange_bytes(description: &ModelDescription, tokens: usize) -> usize {
        Exchange::bytes(description, tokens) + TokenPath::device_bytes(description)
    }

    /// For `capacity` positions. Loads the kernels of tokens in contexts of any
    /// length.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`] where the device has no room, for kernels
    /// either; the driver's.
    pub fn new(
        of: &Model,
        ropes: &[Rope],
        capacity: usize,
        options: &SessionOptions,
    ) -> Result<Self> {
        let (model, description) = (gpu_of(of)?, of.description());
        // Also while what was made is dropped, where the rest is refused.
        let _entered = model.device().enter();
        let kv = options.kv;
        let tokens = pass_tokens(options.prefill_chunk, capacity);
        let keeps_copy = options.device_tokens && !model.weights.is_whole();
        let state = SequenceState::new(model.device(), description, (capacity, kv), keeps_copy)?;
        let arena = model.device().arena(Self::exchange_bytes(description, tokens))?;
        let token = || Token::new(model, &arena, description, options.graphs);
        let token = match options.device_tokens.then(token) {
            None => Err(NoToken::Off),
            Some(Err(error)) if error.is_sticky() => return Err(error.into()),
            Some(token) => token.map_err(NoToken::Refused),
        };
        let buffers = Buffers::new(model.device(), description, capacity, tokens)?;
        if let Ok(Token { path, .. }) = &token {
            let on = On { model: of, gpu: model, ropes };
            let ids = &[0];
            let first = GpuPass { ids, first_position: 0, wanted: 1, session: 0, is_prompt: false };
            for most in Graphs::sizes(capacity) {
                let step = Some(Step { path, most });
                let pass = on.pass((&buffers, &path.exchange), &first, step);
                let launch = || launch_token(&pass, path, &state.layers, &mut |_| Ok(()));
                pass.stream().rehearse(launch)?;
            }
        }
        Ok(Self {
            state,
            buffers,
            exchange: Exchange::new(&arena, description, tokens)?,
            capacity,
            pass_tokens: tokens,
            logits: Vec::new(),
            is_new: true,
            inputs: Inputs::default(),
            token,
            device: model.device().clone(),
            leaving: None,
        })
    }

    pub fn capacity(&self) -> usize {
        self.capacity
    }

    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Why tokens take longer than they could.
    pub fn warning(&self) -> Option<String> {
        match &self.token {
            Err(NoToken::Off) => None,
            Err(NoToken::Refused(error)) => Some(format!(
                "no memory that the GPU and the processor share ({error}): the GPU waits for the \
                 processor in every layer"
            )),
            Err(NoToken::Late(error)) => Some(format!(
                "{error}. That was the second time within a few tokens: from now on the processor \
                 launches layer by layer, which is slower but waits for nothing. See whether a \
                 disk stalls, or a debugger or profiler runs launches one by one"
            )),
            Ok(token) => token.graphs.as_ref().and_then(Graphs::refusal).map(|error| {
                format!(
                    "the driver refused a CUDA graph of a token ({error}): its kernels are \
                     launched one by one"
                )
            }),
        }
    }

    /// Recurrent state cannot go back.
    pub fn can_rewind(&self) -> bool {
        self.state.can_rewind()
    }

    /// Forgets everything, before the next pass.
    pub fn forget(&mut self) {
        self.is_new = true;
    }

    /// Runs a pass and leaves its logits, `[wanted, vocab]`. A failed or
    /// cancelled one leaves the cache behind `first_position`, and recurrent
    /// state, undefined.
    pub fn forward(
        &mut self,
        model: &Model,
        ropes: &[Rope],
        pass: GpuPass<'_>,
        observer: &mut dyn Observer,
        cancel: &Cancel,
    ) -> Result<()> {
        let gpu = gpu_of(model)?;
        let (description, on) = (model.description(), On { model, gpu, ropes });
        if self.is_new {
            let _entered = enter(gpu, cancel)?;
            self.state.clear(gpu.device().compute())?;
            self.is_new = false;
        }
        self.logits.clear();
        let mut before = 0;
        for ids in pass.ids.chunks(self.pass_tokens) {
            if cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let first_position = pass.first_position + before;
            before += ids.len();
            // Of this piece, those that are among the last `wanted`.
            let wanted = (before + pass.wanted).saturating_sub(pass.ids.len()).min(ids.len());
            let piece = GpuPass { ids, first_position, wanted, ..pass };
            let _entered = enter(gpu, cancel)?;
            let GpuPass { session, is_prompt, .. } = pass;
            let fed = Fed { session, first_position, tokens: ids, is_prompt };
            observer.fed(&fed);
            if (ids.len(), wanted, self.token.is_ok()) != (1, 1, true) {
                self.piece(on, piece, observer, cancel)?;
                continue;
            }
            let told = self.logits.len();
            match self.token(on, piece, observer, cancel) {
                // The device waits for nobody in a piece. Its cells are written
                // again.
                Err(Error::Cuda(late @ CudaError::Late { .. })) => {
                    if !self.state.go_back(gpu.device().compute())? {
                        return Err(late.into());
                    }
                    if self.token.as_mut().is_ok_and(Token::is_late_again) {
                        self.token = Err(NoToken::Late(late));
                    }
                    observer.fed(&fed);
                    self.logits.truncate(told);
                    self.piece(on, piece, observer, cancel)?;
                }
                done => done?,
            }
        }
        if description.logit_scale != 1.0 {
            self.logits.iter_mut().for_each(|logit| *logit *= description.logit_scale);
        }
        let first = pass.first_position + pass.ids.len() - pass.wanted;
        check_finite(&self.logits, description.vocab, first)
    }

    /// A pass in which the host launches layer by layer.
    fn piece(
        &mut self,
        on: On<'_>,
        pass: GpuPass<'_>,
        observer: &mut dyn Observer,
        cancel: &Cancel,
    ) -> Result<()> {
        self.inputs.fill(on, &self.exchange, pass)?;
        let span = self.exchange.inputs.part(0..self.inputs.bytes.len());
        on.gpu.device().compute().upload(&span, &self.inputs.bytes)?;
        let piece = on.pass((&self.buffers, &self.exchange), &pass, None);
        let store = on.gpu.store();
        let info = pass_info(&pass, false);
        let _turn = store.map(|store| store.begin_pass(info, cancel)).transpose()?;
        if let (Some(moving), 1) = (on.gpu.moving(), pass.ids.len()) {
            moving.decider().next_token();
        }
        let mut meter = Meter::start(store);
        let mut companions = Companions { observer, cancel, meter: &mut meter, sent: Vec::new() };
        launch(&piece, &self.state.layers, pass.wanted, &mut |index, layer: &DeviceLayer| {
            if companions.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let (norm, block) = (&layer.feed_forward_norm, &layer.feed_forward);
            feed_forward::run(&piece, index, norm, block, &mut companions)
        })?;
        tell(&piece, companions.observer)?;
        head(&piece, pass.wanted, &mut self.logits)?;
        drop(companions);
        meter.finish();
        Ok(())
    }

    /// One token, which the device computes by itself.
    fn token(
        &mut self,
        on: On<'_>,
        pass: GpuPass<'_>,
        observer: &mut dyn Observer,
        cancel: &Cancel,
    ) -> Result<()> {
        let Ok(token) = &mut self.token else { unreachable!("the caller has looked") };
        let On { gpu, .. } = on;
        let store = gpu.store();
        let info = pass_info(&pass, true);
        let _turn = store.map(|store| store.begin_pass(info, cancel)).transpose()?;
        let mut meter = Meter::start(store);
        let most = Graphs::most(pass.first_position, self.capacity);
        let Token { path, graphs, step, updates, buffers, .. } = token;
        self.inputs.fill(on, &path.exchange, pass)?;
        let path = &*path;
        let step_of = Some(Step { path, most });
        let piece = on.pass((&self.buffers, &path.exchange), &pass, step_of);
        let layers = &self.state.layers;
        let mut companions = Companions { observer, cancel, meter: &mut meter, sent: Vec::new() };
        if let Some(graphs) = graphs {
            graphs.make(&piece, most, || launch_token(&piece, path, layers, &mut |_| Ok(())))?;
        }
        self.state.keep(piece.stream())?;
        *step = step.checked_add(1).unwrap_or(1);
        gpu.slots().take(updates);
        let written = path.write_step(*step, pass.first_position, updates, &self.inputs.bytes);
        if let Err(error) = written {
            gpu.slots().put_back(updates);
            return Err(error.into());
        }
        if let Some(moving) = gpu.moving() {
            moving.decider().next_token();
        }
        let mut has_begun = false;
        let mut service = Service::new(&piece, path, *step, &mut companions, buffers);
        let submit = |graphs: &mut Graphs| graphs.submit(piece.stream(), most);
        let launched = match graphs.as_mut().map_or(Ok(false), submit) {
            Ok(true) => Ok(()),
            Ok(false) => launch_token(&piece, path, layers, &mut |layer| {
                has_begun = true;
                service.serve_before(layer)
            }),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = launched {
            // Once they are set, copies set entries as well.
            if !has_begun {
                gpu.slots().put_back(updates);
            }
            return Err(error);
        }
        service.serve_before(layers.len())?;
        let rows = gpu.weights.head.weight.rows;
        let (from, room) = (&piece.buffers.logits, &mut self.inputs.logits);
        read_floats(piece.stream(), from, rows, room, &mut self.logits)?;
        service.finish()?;
        if path.mail().layers.iter().all(Option::is_none) {
            tell(&piece, companions.observer)?;
        }
        drop(companions);
        meter.finish();
        Ok(())
    }
}

impl Drop for GpuSession {
    fn drop(&mut self) {
        self.leaving = Some(self.device.enter());
    }
}

/// Alone at the device. Nobody is there twice at once: an observer must not
/// make or drop a session or a model.
fn enter(gpu: &GpuModel, cancel: &Cancel) -> Result<Entered> {
    gpu.device().enter_unless(&|| cancel.is_cancelled()).ok_or(Error::Cancelled)
}

fn gpu_of(model: &Model) -> Result<&GpuModel, CudaError> {
    model.gpu().ok_or_else(|| CudaError::unsupported("a model that is not there"))
}

fn pass_info<'a>(pass: &GpuPass<'a>, keeps_ahead: bool) -> PassInfo<'a> {
    let GpuPass { ids, first_position, session, .. } = *pass;
    PassInfo { ids, session, is_start: first_position == 0, keeps_ahead }
}

#[cfg(test)]
mod tests;
