//! Checkpoints as files.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use sha2::{Digest, Sha256};

/// A whole checkpoint: every file that its manifest names is there with the size and SHA-256 it gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Where it lies.
    pub folder: PathBuf,
    /// The step its weights are of.
    pub step: u64,
    /// Its files without the manifest, by name, with their SHA-256.
    pub parts: BTreeMap<String, String>,
}

/// A tensor in a safetensors file.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredTensor {
    /// Type of its elements.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its bytes, little-endian.
    pub bytes: Vec<u8>,
}

#[derive(Deserialize)]
struct Manifest {
    step: u64,
    parts: Vec<Part>,
}

#[derive(Deserialize)]
struct Part {
    name: String,
    num_bytes: usize,
    sha256: String,
}

impl Checkpoint {
    /// Reads the manifest in `folder`, if there is one, and checks every file against it.
    ///
    /// # Panics
    /// If a file is not what the manifest says.
    #[must_use]
    pub fn open(folder: &Path) -> Option<Self> {
        let manifest = std::fs::read(folder.join("manifest.json")).ok()?;
        let manifest: Manifest = serde_json::from_slice(&manifest).expect("a manifest");
        let check = |part: Part| {
            let bytes =
                std::fs::read(folder.join(&part.name)).unwrap_or_else(|error| panic!("{} in {}: {error}", part.name, folder.display()));
            let sha256: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!((bytes.len(), &sha256), (part.num_bytes, &part.sha256), "{} in {}", part.name, folder.display());
            (part.name, sha256)
        };
        let parts = manifest.parts.into_iter().map(check).collect();
        Some(Self { folder: folder.to_owned(), step: manifest.step, parts })
    }

    /// The tensors of a safetensors file.
    ///
    /// # Panics
    /// If the file is none.
    #[must_use]
    pub fn tensors(&self, part: &str) -> BTreeMap<String, StoredTensor> {
        let bytes = self.read(part);
        let file = SafeTensors::deserialize(&bytes).expect("a safetensors file");
        let stored = |view: &safetensors::tensor::TensorView<'_>| StoredTensor {
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            bytes: view.data().to_vec(),
        };
        file.iter().map(|(name, view)| (name.to_owned(), stored(&view))).collect()
    }

    /// The metadata of a safetensors file.
    ///
    /// # Panics
    /// If the file is none.
    #[must_use]
    pub fn metadata(&self, part: &str) -> BTreeMap<String, String> {
        let bytes = self.read(part);
        let (_, header) = SafeTensors::read_metadata(&bytes).expect("a safetensors file");
        header.metadata().clone().unwrap_or_default().into_iter().collect()
    }

    /// The optimiser's running mean of the gradient: after the first step a tenth of the gradient.
    ///
    /// # Panics
    /// If the checkpoint has none.
    #[must_use]
    pub fn mean_gradient(&self) -> Vec<f32> {
        let tensor = self.tensors("optimizer.safetensors").remove("exp_avg").expect("an exp_avg");
        assert_eq!(tensor.dtype, Dtype::F32);
        tensor.bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().expect("four bytes"))).collect()
    }

    /// Number of samples that the ledger counts as `kind`: committed, filtered, bad or not_finite.
    ///
    /// # Panics
    /// If the ledger has no such number.
    #[must_use]
    pub fn ledger_total(&self, kind: &str) -> u64 {
        let of = |source: &serde_json::Value| source["totals"][kind].as_u64().unwrap_or_else(|| panic!("totals.{kind} in {source}"));
        self.ledger_sources().iter().map(of).sum()
    }

    /// Number of samples that the ledger counts as passed over by each rule: `filtered` or `bad`.
    ///
    /// # Panics
    /// If the ledger has no such counts.
    #[must_use]
    pub fn skipped_by_rule(&self, kind: &str) -> BTreeMap<String, u64> {
        let mut rules: BTreeMap<String, u64> = BTreeMap::new();
        for source in self.ledger_sources() {
            let counts: BTreeMap<String, u64> =
                serde_json::from_value(source["rules"][kind].clone()).unwrap_or_else(|error| panic!("rules.{kind} in {source}: {error}"));
            counts.into_iter().for_each(|(rule, count)| *rules.entry(rule).or_default() += count);
        }
        rules
    }

    fn ledger_sources(&self) -> Vec<serde_json::Value> {
        let ledger: serde_json::Value = serde_json::from_slice(&self.read("ledger.json")).expect("a ledger");
        ledger["sources"].as_array().cloned().unwrap_or_else(|| panic!("sources in {ledger}"))
    }

    fn read(&self, part: &str) -> Vec<u8> {
        std::fs::read(self.folder.join(part)).unwrap_or_else(|error| panic!("{part} in {}: {error}", self.folder.display()))
    }
}
