//! What training changes: adapter, optimiser moments, moving average, step. Everything else is frozen.

use peapod_model::adapter::{ADAPTER_FILE, Adapter, AdapterConfig, PYTORCH_FILE};
use peapod_model::optim::{AdamW, AdamWConfig, Ema};
use peapod_model::{Error, Result};
use peapod_proto::ids::{Generation, Step};
use sha2::{Digest, Sha256};
use tch::{Device, Kind, Tensor};

use crate::loss_scale::LossScale;

/// The trained state after one step.
pub struct TrainState {
    /// The adapter.
    pub adapter: Adapter,
    /// Its moments.
    pub optimizer: AdamW,
    /// Its moving average, if the job keeps one.
    pub ema: Option<Ema>,
    /// What the loss is multiplied with, if the networks' numbers need it.
    pub loss_scale: Option<LossScale>,
    /// The last applied step.
    pub step: Step,
    /// The generation that trained it; [`Generation::NONE`] if it is fresh or from a checkpoint.
    pub generation: Generation,
}

/// A copy of the state for a checkpoint, on the host.
pub struct Snapshot {
    /// The adapter.
    pub adapter: Adapter,
    /// First moment.
    pub exp_avg: Tensor,
    /// Second moment.
    pub exp_avg_sq: Tensor,
    /// Updates the optimiser has made.
    pub num_updates: u64,
    /// The moving average.
    pub ema: Option<Adapter>,
    /// The loss scale, if there is one.
    pub loss_scale: Option<LossScale>,
    /// The step.
    pub step: Step,
    /// The generation it was copied in.
    pub generation: Generation,
}

impl TrainState {
    /// Fresh weights: the same on every machine, drawn from the job's seed.
    ///
    /// # Errors
    /// As [`Adapter::fresh`].
    pub fn fresh(config: AdapterConfig, optimizer: AdamWConfig, ema_decay: f64, seed: u64, device: Device) -> Result<Self> {
        Self::with_adapter(Adapter::fresh(config, seed, device)?, optimizer, ema_decay, device)
    }

    fn with_adapter(adapter: Adapter, optimizer: AdamWConfig, ema_decay: f64, device: Device) -> Result<Self> {
        let optimizer = AdamW::new(optimizer, adapter.num_parameters() as i64, device);
        let ema = if ema_decay > 0.0 { Some(Ema::new(adapter.flat(), ema_decay)?) } else { None };
        Ok(Self { adapter, optimizer, ema, loss_scale: None, step: Step(0), generation: Generation::NONE })
    }

    /// The state kept in a checkpoint's files. A moving average that the checkpoint lacks starts from its weights.
    ///
    /// # Errors
    /// If a file is missing or of another shape than `config`.
    pub fn from_checkpoint<'a>(
        config: AdapterConfig,
        optimizer: AdamWConfig,
        ema_decay: f64,
        device: Device,
        step: Step,
        part: impl Fn(&str) -> Option<&'a [u8]>,
    ) -> Result<Self> {
        let file =
            |name: &str| part(name).ok_or_else(|| Error::Invalid { path: name.into(), reason: "it is missing from the checkpoint".into() });
        let adapter = Adapter::from_safetensors(file(Snapshot::ADAPTER)?, device)?;
        if *adapter.config() != config {
            let reason = format!("the checkpoint's adapter is {:?}, the job's is {config:?}", adapter.config());
            return Err(Error::Invalid { path: Snapshot::ADAPTER.into(), reason });
        }
        let mut state = Self::with_adapter(adapter, optimizer, ema_decay, device)?;
        state.optimizer = AdamW::from_safetensors(optimizer, file(Snapshot::OPTIMIZER)?, device)?;
        if let (Some(ema), Some(bytes)) = (&mut state.ema, part(Snapshot::EMA)) {
            ema.restore(Adapter::from_safetensors(bytes, device)?.flat())?;
        }
        if let Some(bytes) = part(Snapshot::LOSS_SCALE) {
            let scale = serde_json::from_slice(bytes).ok().and_then(LossScale::checked);
            let damaged = || Error::Invalid { path: Snapshot::LOSS_SCALE.into(), reason: "it holds no loss scale".into() };
            state.loss_scale = Some(scale.ok_or_else(damaged)?);
        }
        state.step = step;
        Ok(state)
    }

    /// The adapter with the moving average for its weights, if the job keeps one.
    ///
    /// # Errors
    /// From libtorch.
    pub fn average(&self) -> Result<Option<Adapter>> {
        self.ema.as_ref().map(|ema| self.adapter.with_parameters(ema.flat())).transpose()
    }

    /// Everything as it stands, without a copy: for another thread, while no update is made.
    ///
    /// # Errors
    /// From libtorch.
    pub fn view(&self, generation: Generation) -> Result<View> {
        Ok(View {
            adapter: self.adapter.alias()?,
            exp_avg: self.optimizer.exp_avg().shallow_clone(),
            exp_avg_sq: self.optimizer.exp_avg_sq().shallow_clone(),
            num_updates: self.optimizer.num_steps(),
            ema: self.ema.as_ref().map(|ema| ema.flat().shallow_clone()),
            loss_scale: self.loss_scale,
            step: self.step,
            generation,
        })
    }

    /// Number of bytes of [`TrainState::to_bytes`].
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        let buffers = 3 + usize::from(self.ema.is_some());
        HEADER_BYTES + buffers * self.adapter.num_parameters() * size_of::<f32>() + DIGEST_BYTES
    }

    /// Everything as bytes, for a member that lacks it: step, updates, loss scale, the flat buffers, then the SHA-256 of all that.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.num_bytes()];
        let (state, digest) = bytes.split_at_mut(self.num_bytes() - DIGEST_BYTES);
        let (header, values) = state.split_at_mut(HEADER_BYTES);
        header[..8].copy_from_slice(&self.step.0.to_le_bytes());
        header[8..16].copy_from_slice(&self.optimizer.num_steps().to_le_bytes());
        header[16..].copy_from_slice(&self.loss_scale.unwrap_or_default().to_bytes());
        let buffers = [self.adapter.flat(), self.optimizer.exp_avg(), self.optimizer.exp_avg_sq()];
        let places = values.chunks_exact_mut(self.adapter.num_parameters() * size_of::<f32>());
        for (tensor, place) in buffers.into_iter().chain(self.ema.as_ref().map(Ema::flat)).zip(places) {
            copy_bytes(tensor, place);
        }
        digest.copy_from_slice(&Sha256::digest(state));
        bytes
    }

    /// Takes over what [`TrainState::to_bytes`] made of a state of the same shape.
    ///
    /// TCP's checksums miss one error in some tens of thousands, and what a GPU's memory or a driver damages they never see: weights that
    /// are not the source's would train on unnoticed.
    ///
    /// # Errors
    /// [`Error::Shape`] if the length differs, [`Error::Invalid`] if the bytes are not those that were sent; nothing has changed then.
    pub fn restore(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.len() != self.num_bytes() {
            let detail = format!("{} bytes for a state of {}", bytes.len(), self.num_bytes());
            return Err(Error::Shape { what: "TrainState::restore", detail });
        }
        let (bytes, digest) = bytes.split_at(bytes.len() - DIGEST_BYTES);
        if Sha256::digest(bytes).as_slice() != digest {
            let reason = "they were damaged on their way: their SHA-256 is not the one that came with them";
            return Err(Error::Invalid { path: "weights from another member".into(), reason: reason.into() });
        }
        let number = |at: usize| bytes[at..].first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes)).unwrap_or_default();
        let buffer_bytes = self.adapter.num_parameters() * size_of::<f32>();
        let shape = [self.adapter.num_parameters() as i64];
        let mut buffers = bytes[HEADER_BYTES..].chunks_exact(buffer_bytes);
        let mut next = || Tensor::f_from_data_size(buffers.next().unwrap_or_default(), &shape, Kind::Float);
        let (parameters, exp_avg, exp_avg_sq) = (next()?, next()?, next()?);
        self.adapter.set_parameters(&parameters)?;
        self.optimizer.restore(number(8), &exp_avg, &exp_avg_sq)?;
        if let Some(ema) = &mut self.ema {
            ema.restore(&next()?)?;
        }
        if let Some(scale) = &mut self.loss_scale {
            let damaged = || Error::Shape { what: "TrainState::restore", detail: "no loss scale".into() };
            *scale = LossScale::from_bytes(number(16).to_le_bytes()).ok_or_else(damaged)?;
        }
        self.step = Step(number(0));
        Ok(())
    }
}

/// Step, number of updates, loss scale.
const HEADER_BYTES: usize = 16 + LossScale::NUM_BYTES;

/// A SHA-256.
const DIGEST_BYTES: usize = 32;

/// The state after a step, in the tensors that the next update changes.
pub struct View {
    adapter: Adapter,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    num_updates: u64,
    ema: Option<Tensor>,
    loss_scale: Option<LossScale>,
    step: Step,
    generation: Generation,
}

impl View {
    /// First 8 bytes of the SHA-256 of the adapter: equal on all ranks, or they have diverged.
    #[must_use]
    pub fn digest(&self) -> u64 {
        let mut bytes = vec![0; self.adapter.num_parameters() * size_of::<f32>()];
        copy_bytes(self.adapter.flat(), &mut bytes);
        let digest = Sha256::digest(&bytes);
        u64::from_le_bytes(digest.first_chunk::<8>().copied().unwrap_or_default())
    }

    /// Copies everything, so that training can go on while the copy is written.
    ///
    /// # Errors
    /// From libtorch.
    pub fn snapshot(&self) -> Result<Snapshot> {
        // A host tensor moved to the host is itself: only a clone of its values is a copy.
        let host = |tensor: &Tensor| tensor.f_to_device(Device::Cpu).map(|tensor| tensor.copy());
        Ok(Snapshot {
            adapter: self.adapter.copied_to(Device::Cpu, self.adapter.flat())?,
            exp_avg: host(&self.exp_avg)?,
            exp_avg_sq: host(&self.exp_avg_sq)?,
            num_updates: self.num_updates,
            ema: self.ema.as_ref().map(|average| self.adapter.copied_to(Device::Cpu, average)).transpose()?,
            loss_scale: self.loss_scale,
            step: self.step,
            generation: self.generation,
        })
    }
}

impl Snapshot {
    /// File of the adapter in a checkpoint.
    pub const ADAPTER: &str = ADAPTER_FILE;
    /// File of the optimiser's moments.
    pub const OPTIMIZER: &str = "optimizer.safetensors";
    /// File of the moving average.
    pub const EMA: &str = "adapter_ema.safetensors";
    /// File of the loss scale, where there is one.
    pub const LOSS_SCALE: &str = "loss_scale.json";
    /// File of the adapter as the Python implementation saves and loads it, in f16: the average's where there is one.
    pub const PYTORCH: &str = PYTORCH_FILE;

    /// The checkpoint's files. `metadata` is asked for the adapter's (false) and the average's (true).
    ///
    /// # Errors
    /// From serialising.
    pub fn to_files(
        &self,
        optimizer: AdamWConfig,
        metadata: impl Fn(bool) -> std::collections::BTreeMap<String, String>,
    ) -> Result<Vec<(&'static str, Vec<u8>)>> {
        let mut moments = AdamW::new(optimizer, self.exp_avg.numel() as i64, Device::Cpu);
        moments.restore(self.num_updates, &self.exp_avg, &self.exp_avg_sq)?;
        let mut files = vec![(Self::ADAPTER, self.adapter.to_safetensors(&metadata(false))?), (Self::OPTIMIZER, moments.to_safetensors()?)];
        if let Some(ema) = &self.ema {
            files.push((Self::EMA, ema.to_safetensors(&metadata(true))?));
        }
        if let Some(scale) = &self.loss_scale {
            let failed = |error: serde_json::Error| Error::Invalid { path: Self::LOSS_SCALE.into(), reason: error.to_string() };
            files.push((Self::LOSS_SCALE, serde_json::to_vec(scale).map_err(failed)?));
        }
        let sampled = self.ema.as_ref().unwrap_or(&self.adapter);
        let bytes = sampled.to_pytorch(Kind::Half, &metadata(self.ema.is_some()))?;
        // Read back before anybody relies on it: Python may be the only reader for months.
        if Adapter::from_pytorch(&bytes, Device::Cpu)?.config() != sampled.config() {
            return Err(Error::Invalid {
                path: Self::PYTORCH.into(),
                reason: "it does not read back as the adapter it was made of".into(),
            });
        }
        files.push((Self::PYTORCH, bytes));
        Ok(files)
    }
}

/// Writes the values of a flat `f32` tensor, as the little-endian hosts that libtorch runs on hold them.
fn copy_bytes(tensor: &Tensor, place: &mut [u8]) {
    tensor.to_device(Device::Cpu).to_kind(Kind::Float).copy_data_u8(place, tensor.numel());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> AdapterConfig {
        AdapterConfig { input: 4, hidden: 8, depth: 3, pooled: 6, output: Some(10) }
    }

    fn optimizer() -> AdamWConfig {
        AdamWConfig { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }

    fn trained(ema_decay: f64) -> TrainState {
        let mut state = TrainState::fresh(config(), optimizer(), ema_decay, 3, Device::Cpu).unwrap();
        let gradient = Tensor::ones_like(state.adapter.flat());
        state.optimizer.step(state.adapter.flat(), &gradient, 0.1).unwrap();
        if let Some(ema) = &mut state.ema {
            ema.update(state.adapter.flat()).unwrap();
        }
        state.step = Step(1);
        state
    }

    fn digest(state: &TrainState) -> u64 {
        state.view(Generation(1)).unwrap().digest()
    }

    fn bytes_of(tensor: &Tensor) -> Vec<u8> {
        let mut bytes = vec![0; tensor.numel() * size_of::<f32>()];
        copy_bytes(tensor, &mut bytes);
        bytes
    }

    #[test]
    fn state_travels_whole_to_a_member_that_lacks_it() {
        for ema_decay in [0.0, 0.9] {
            let source = trained(ema_decay);
            let mut other = TrainState::fresh(config(), optimizer(), ema_decay, 99, Device::Cpu).unwrap();
            assert_ne!(digest(&other), digest(&source));
            other.restore(&source.to_bytes()).unwrap();
            assert_eq!(other.to_bytes(), source.to_bytes());
            assert_eq!((digest(&other), other.step, other.optimizer.num_steps()), (digest(&source), Step(1), 1));
            assert!(other.restore(&[0; 7]).is_err());
        }
    }

    #[test]
    fn state_that_was_damaged_on_its_way_is_refused_and_changes_nothing() {
        let source = trained(0.9).to_bytes();
        let mut other = TrainState::fresh(config(), optimizer(), 0.9, 99, Device::Cpu).unwrap();
        let before = other.to_bytes();
        // Of each part one bit: step, loss scale, first and last weight, digest.
        for at in [0, HEADER_BYTES - 1, HEADER_BYTES, source.len() - DIGEST_BYTES - 1, source.len() - 1] {
            let mut damaged = source.clone();
            damaged[at] ^= 1;
            let refused = other.restore(&damaged).unwrap_err().to_string();
            assert!(refused.starts_with("weights from another member: they were damaged on their way"), "byte {at}: {refused}");
        }
        assert_eq!(other.to_bytes(), before);
    }

    #[test]
    fn checkpoint_files_give_the_same_state_back() {
        for ema_decay in [0.0, 0.9] {
            let source = trained(ema_decay);
            let metadata = |average: bool| [("average".to_owned(), average.to_string())].into();
            let files = source.view(Generation(1)).unwrap().snapshot().unwrap().to_files(optimizer(), metadata).unwrap();
            assert_eq!(files.len(), if ema_decay > 0.0 { 4 } else { 3 });
            let part = |name: &str| files.iter().find(|(file, _)| *file == name).map(|(_, bytes)| bytes.as_slice());
            let state = TrainState::from_checkpoint(config(), optimizer(), ema_decay, Device::Cpu, Step(1), part).unwrap();
            assert_eq!(state.to_bytes(), source.to_bytes());
            let pytorch = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(pytorch.path(), part(Snapshot::PYTORCH).unwrap()).unwrap();
            assert_eq!(peapod_model::adapter::metadata(pytorch.path()).unwrap(), metadata(ema_decay > 0.0));
            let narrow = AdapterConfig { hidden: 4, ..config() };
            assert!(TrainState::from_checkpoint(narrow, optimizer(), ema_decay, Device::Cpu, Step(1), part).is_err());
        }
    }

    #[test]
    fn loss_scale_travels_and_is_kept_in_checkpoints() {
        let mut source = trained(0.0);
        source.loss_scale = Some(LossScale::default());
        source.loss_scale.iter_mut().for_each(|scale| scale.update(false));
        let mut other = TrainState::fresh(config(), optimizer(), 0.0, 99, Device::Cpu).unwrap();
        other.loss_scale = Some(LossScale::default());
        other.restore(&source.to_bytes()).unwrap();
        assert_eq!(other.loss_scale, source.loss_scale);
        let files = source.view(Generation(1)).unwrap().snapshot().unwrap().to_files(optimizer(), |_| Default::default()).unwrap();
        let part = |name: &str| files.iter().find(|(file, _)| *file == name).map(|(_, bytes)| bytes.as_slice());
        let resume = |scale: Option<&[u8]>| {
            let part = |name: &str| if name == Snapshot::LOSS_SCALE { scale } else { part(name) };
            TrainState::from_checkpoint(config(), optimizer(), 0.0, Device::Cpu, Step(1), part).map(|state| state.loss_scale)
        };
        assert_eq!(resume(part(Snapshot::LOSS_SCALE)).unwrap(), source.loss_scale);
        assert!(resume(Some(b"{}")).is_err());
        assert_eq!(resume(None).unwrap(), None);
    }

    #[test]
    fn snapshot_does_not_change_with_training() {
        let mut state = trained(0.0);
        let view = state.view(Generation(1)).unwrap();
        let (snapshot, digest) = (view.snapshot().unwrap(), view.digest());
        let before = bytes_of(snapshot.adapter.flat());
        let gradient = Tensor::ones_like(state.adapter.flat());
        state.optimizer.step(state.adapter.flat(), &gradient, 0.1).unwrap();
        assert_eq!(bytes_of(snapshot.adapter.flat()), before);
        // The view does, which is why no update is made while it is in use.
        assert_ne!(view.digest(), digest);
    }
}
