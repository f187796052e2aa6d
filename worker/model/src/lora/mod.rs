//! LoRA files: low-rank additions to the weights of a model, in the layouts they are exchanged in.
//!
//! They are merged as the weights are read: what runs afterwards is an ordinary model, as fast as without. Several add up.
//! Source: Hu et al. 2021 (arXiv:2106.09685); the layouts are those of diffusers, PEFT and kohya's scripts.

mod keys;
mod names;
mod peft;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use self::keys::{Half, Key, PEFT_BEGINNING, Spelling};
use self::names::Names;
use self::peft::{PeftStrengths, Strength};
use crate::hub::locate;
use crate::source::Part;
use crate::weights::{Addition, Additions, Stored, Weights};
use crate::{Error, Result};

/// An opened LoRA file.
pub struct Lora {
    path: PathBuf,
    scale: f64,
    modules: Vec<Module>,
    /// Keys of no known layout, and those for what another key is for, too.
    unknown: Vec<String>,
}

/// What is added to one weight.
struct Module {
    part: Part,
    name: String,
    spelling: Spelling,
    /// A key of it, for errors.
    key: String,
    down: Option<Stored>,
    up: Option<Stored>,
    /// What the product is multiplied by, beside the scale asked for; `None`: by 1.
    strength: Option<Strength>,
}

impl Lora {
    /// Opens a file (`.safetensors`, or what `torch.save` wrote) whose effect is multiplied by `scale`. How strong it is by itself is said
    /// by the alphas in it, by its metadata, or, where PEFT wrote it, by the `adapter_config.json` beside it.
    ///
    /// Errors: those of [`Weights::open`]; [`Error::Unsupported`] for variants that cannot be merged; [`Error::Invalid`] if PEFT wrote it
    /// and nothing says how strong it is.
    pub fn open(path: &Path, scale: f64) -> Result<Self> {
        let path = locate(path)?;
        let weights = Weights::open(&path)?;
        let peft = PeftStrengths::read(&path, &weights)?;
        let mut modules: BTreeMap<(Part, String), Module> = BTreeMap::new();
        let mut unknown = Vec::new();
        for key in weights.keys() {
            let (Some(Key { part, name, spelling, half }), Some(stored)) = (Key::parse(key), weights.stored_entry(key)) else {
                unknown.push(key.to_owned());
                continue;
            };
            let fresh = || Module { part, name: name.clone(), spelling, key: key.into(), down: None, up: None, strength: None };
            let module = modules.entry((part, name.clone())).or_insert_with(fresh);
            let other = match half {
                Half::Down => module.down.replace(stored),
                Half::Up => module.up.replace(stored),
                Half::Alpha => {
                    let alpha = weights.stored(key).filter(|alpha| alpha.numel() == 1).map(|alpha| alpha.double_value(&[]));
                    module.strength = alpha.map(Strength::ByRank);
                    None
                }
            };
            // Two LoRAs of PEFT in one file, say.
            if other.is_some() {
                unknown.push(format!("{key} (the second of {name})"));
            }
        }
        let mut modules: Vec<Module> = modules.into_values().collect();
        for module in &mut modules {
            if module.strength.is_none() {
                module.strength = peft.of(module.part, &module.name)?;
            }
            if module.strength.is_none() && module.key.starts_with(PEFT_BEGINNING) {
                return Err(PeftStrengths::missing(&path));
            }
        }
        Ok(Self { path, scale, modules, unknown })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it has something for a part of the model.
    pub(crate) fn concerns(&self, part: Part) -> bool {
        self.modules.iter().any(|module| module.part == part)
    }
}

/// Finds what several files add to each weight. `open` opens the weights of a part, or says that the model has no such part.
///
/// Errors: one [`Error::Lora`] for the first file with keys of no known layout, of no weight of this model or of other shapes, all listed;
/// those of `open`.
pub(crate) fn additions(loras: &[Lora], open: impl Fn(Part) -> Result<Option<Weights>>) -> Result<BTreeMap<Part, Additions>> {
    let mut additions: BTreeMap<Part, Additions> = BTreeMap::new();
    let mut unknown: Vec<Vec<String>> = loras.iter().map(|lora| lora.unknown.clone()).collect();
    for part in [Part::Unet, Part::TextEncoder, Part::TextEncoder2] {
        if !loras.iter().any(|lora| lora.concerns(part)) {
            continue;
        }
        let weights = open(part)?;
        let names = weights.as_ref().map(|weights| Names::of(part, weights.keys()));
        for (lora, unknown) in loras.iter().zip(&mut unknown) {
            for module in lora.modules.iter().filter(|module| module.part == part) {
                let found = match (&weights, &names) {
                    (Some(weights), Some(names)) => module.fit(weights, names, lora.scale),
                    _ => Err(format!("{} (the model has no {part})", module.key)),
                };
                match found {
                    Ok((key, addition)) => additions.entry(part).or_default().entry(key).or_default().push(addition),
                    Err(problem) => unknown.push(problem),
                }
            }
        }
    }
    match loras.iter().zip(unknown).find(|(_, unknown)| !unknown.is_empty()) {
        Some((lora, unknown)) => Err(Error::Lora { path: lora.path.clone(), unknown }),
        None => Ok(additions),
    }
}

impl Module {
    /// The weight it belongs to and what is added, or what is wrong with it.
    fn fit(&self, weights: &Weights, names: &Names, scale: f64) -> Result<(String, Addition), String> {
        let Self { key, name, spelling, down, up, strength, .. } = self;
        let module = names.find(name, *spelling).ok_or_else(|| key.clone())?;
        let weight = format!("{module}.weight");
        let (Some(down), Some(up)) = (down, up) else { return Err(format!("{key} (without its other half)")) };
        let (shape, down_shape, up_shape) = (weights.shape(&weight).unwrap_or_default(), down.shape(), up.shape());
        let elements = |shape: &[i64]| shape.iter().product::<i64>();
        let fits = match (shape, down_shape, up_shape) {
            ([rows, row @ ..], [rank, down @ ..], [outputs, up_rank, up @ ..]) => {
                rank == up_rank && rows == outputs && elements(down) == elements(row) && elements(up) == 1
            }
            _ => false,
        };
        if !fits {
            return Err(format!("{key} ({down_shape:?} and {up_shape:?} for {weight} of {shape:?})"));
        }
        let rank = down_shape.first().copied().unwrap_or(1).max(1) as f64;
        let scale = scale * strength.map_or(1.0, |strength| strength.at(rank));
        Ok((weight, Addition { down: down.clone(), up: up.clone(), scale }))
    }
}

#[cfg(test)]
mod tests;
