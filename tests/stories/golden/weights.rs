//! Files of weights: names and values as the Python libraries read them.

use peapod_model::weights::Weights;

use super::{Case, Result, Tensors};

/// All tensors of a file or folder, as stored.
pub fn file(case: &Case) -> Result<Tensors> {
    Ok(all("", &Weights::open(&case.path("file")?)?))
}

/// All tensors of a pipeline in one file, each model's under a prefix, with the names of the pipeline's folders.
pub fn single_file(case: &Case) -> Result<Tensors> {
    let models = Weights::open_single_file(&case.path("file")?)?;
    let second = models.text_encoder_2.iter().flat_map(|weights| all("text_encoder_2.", weights));
    let named = [("unet.", &models.unet), ("vae.", &models.vae), ("text_encoder.", &models.text_encoder)];
    Ok(named.into_iter().flat_map(|(prefix, weights)| all(prefix, weights)).chain(second).collect())
}

fn all(prefix: &str, weights: &Weights) -> Tensors {
    weights.keys().filter_map(|key| Some((format!("{prefix}{key}"), weights.stored(key)?))).collect()
}
