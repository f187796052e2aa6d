//! Where a file of weights holds the text encoder: alone, under the name of a task model, or beside an image encoder.

use tch::{Device, Kind, Tensor};

use crate::Result;
use crate::weights::{Scope, Weights};

/// The keys of a weight set that belong to one encoder: those under its prefix.
pub(super) struct Tower<'a> {
    weights: &'a Weights,
    prefix: String,
}

impl<'a> Tower<'a> {
    /// Finds the encoder by `landmark`, the end of a key that every encoder of its kind has once; decoders are passed over.
    ///
    /// A set without such a key is taken for a bare encoder, of which [`Tower::finish`] then tells what is missing.
    pub(super) fn find(weights: &'a Weights, landmark: &str) -> Self {
        let prefixes = weights.keys().filter_map(|key| key.strip_suffix(landmark));
        let prefixes = prefixes.filter(|prefix| (prefix.is_empty() || prefix.ends_with('.')) && !prefix.ends_with("decoder."));
        // The shortest, should a training state hold copies of the model.
        let prefix = prefixes.min_by_key(|prefix| prefix.len()).unwrap_or_default();
        Self { weights, prefix: prefix.strip_suffix('.').unwrap_or_default().to_owned() }
    }

    /// The encoder's tensors, converted to `kind` and copied to `device`.
    pub(super) fn scope(&self, kind: Kind, device: Device) -> Scope<'a> {
        under(self.weights.root(kind, device), &self.prefix)
    }

    /// The tensors one level above the encoder's, where wrappers keep their own layers.
    pub(super) fn parent(&self, kind: Kind, device: Device) -> Scope<'a> {
        under(self.weights.root(kind, device), self.parent_prefix())
    }

    fn parent_prefix(&self) -> &str {
        self.prefix.rsplit_once('.').map_or("", |(parent, _)| parent)
    }

    /// A tensor as it is stored one level above the encoder's, whatever its shape.
    pub(super) fn beside(&self, name: &str) -> Option<Tensor> {
        let parent = self.parent_prefix();
        self.weights.stored(&if parent.is_empty() { name.to_owned() } else { format!("{parent}.{name}") })
    }

    /// Ends the loading as [`Weights::finish`] does. What lies outside the prefix belongs to other models and may be left over, and so
    /// may keys of the encoder that begin with one of `ignore`.
    pub(super) fn finish(&self, ignore: &[&str]) -> Result<()> {
        let inside = if self.prefix.is_empty() { String::new() } else { format!("{}.", self.prefix) };
        let left_over: Vec<&str> = self
            .weights
            .keys()
            .filter(|key| key.strip_prefix(&inside).is_none_or(|own| ignore.iter().any(|start| own.starts_with(start))))
            .collect();
        self.weights.finish(&left_over)
    }
}

fn under<'a>(root: Scope<'a>, prefix: &str) -> Scope<'a> {
    if prefix.is_empty() { root } else { root / prefix }
}
