//! Samples whose frozen part was computed before: what `worker precompute` writes, and training reads where a picture would be.
//!
//! A shard of them is a tar like any other, with as many samples under the same keys in the same order as the one it was made of:
//!
//! ```text
//! __cached__/stamp.json    first: what the shard was made of, and how
//! KEY.json                 the captions, byte for byte
//! KEY.latents.safetensors  the posterior's moments, sizes, and text states
//! KEY.skipped              instead of the latents, of a sample that is not trained: rule and words
//! __cached__/truncated.txt last: why the tar it was made of broke off, if it did
//! ```
//!
//! Captions are judged anew by a job's rules, so that the samples which train, and as what, are told in one place.

mod recipe;

pub use safetensors::tensor::Dtype;
use std::sync::OnceLock;

use safetensors::tensor::{SafeTensors, TensorView};

pub use self::recipe::{Recipe, RecipeError, Stamp};
use crate::sample::{Rule, Skip};
use crate::{Error, Result};

/// The stamp's name in the tar.
pub const STAMP: &str = "__cached__/stamp.json";
/// The name of what says that the tar it was made of broke off.
pub const TRUNCATED: &str = "__cached__/truncated.txt";
/// Extension of a sample's numbers.
pub const LATENTS: &str = "latents.safetensors";
/// Extension of what says why a sample is not trained.
pub const SKIPPED: &str = "skipped";

/// Numbers as they lie in a file, row by row, little-endian.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Array {
    /// F16, BF16 or F32; U8 for masks.
    pub dtype: Dtype,
    /// Lengths, the outermost first.
    pub shape: Vec<usize>,
    /// As many as shape and dtype ask for.
    pub bytes: Vec<u8>,
}

/// What the frozen encoders have made of a sample.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedSample {
    /// Width and height of the picture as found.
    pub original_size: (u32, u32),
    /// Where the crop's corner lies in the scaled picture, `(y, x)`.
    pub crop: (u32, u32),
    /// Mean of the latents' distribution, `[channels, height, width]`.
    pub mean: Array,
    /// Logarithm of its variance, of the same shape.
    pub log_variance: Array,
    /// What the teacher's encoders say of the English caption.
    pub english: Option<EnglishStates>,
    /// What the student's encoder says of the prompt.
    pub student: Option<StudentStates>,
}

/// The teacher's text states.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnglishStates {
    /// Of each token, `[tokens, width]`.
    pub sequence: Array,
    /// Of the whole text, `[width]`; none for a model that has no such thing.
    pub pooled: Option<Array>,
}

/// The student's text states.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StudentStates {
    /// Of each token, `[tokens, width]`.
    pub sequence: Array,
    /// 1 where a token is no padding, `[tokens]`.
    pub mask: Array,
}

/// The shapes of the text states in a job's cached samples, which are put together in batches: as long as the first one's.
#[derive(Debug, Default)]
pub(crate) struct TextShapes {
    english: OnceLock<[Option<Vec<usize>>; 2]>,
    student: OnceLock<Vec<usize>>,
}

impl TextShapes {
    /// Errors: [`Error::Cached`] if a sample's text states are of other shapes than those before.
    pub(crate) fn check(&self, sample: &CachedSample) -> Result<()> {
        let refuse = |what: &str, is: &dyn std::fmt::Debug, others: &dyn std::fmt::Debug| {
            Err(Error::Cached(format!("{what} is {is:?}, but {others:?} in the first sample that was read")))
        };
        if let Some(EnglishStates { sequence, pooled }) = &sample.english {
            let shapes = [Some(sequence.shape.clone()), pooled.as_ref().map(|pooled| pooled.shape.clone())];
            let first = self.english.get_or_init(|| shapes.clone());
            if *first != shapes {
                let at = usize::from(first[0] == shapes[0]);
                return refuse(["english.sequence", "english.pooled"][at], &shapes[at], &first[at]);
            }
        }
        if let Some(StudentStates { sequence, .. }) = &sample.student {
            let first = self.student.get_or_init(|| sequence.shape.clone());
            if *first != sequence.shape {
                return refuse("student.sequence", &sequence.shape, first);
            }
        }
        Ok(())
    }
}

impl CachedSample {
    /// Bytes of all its numbers.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        let english = self.english.iter().flat_map(|states| [Some(&states.sequence), states.pooled.as_ref()]).flatten();
        let student = self.student.iter().flat_map(|states| [&states.sequence, &states.mask]);
        [&self.mean, &self.log_variance].into_iter().chain(english).chain(student).map(|array| array.bytes.len()).sum()
    }

    /// The bytes of its member.
    ///
    /// # Errors
    /// [`Error::Cached`] if an array has not the bytes that its shape asks for.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let pair = |(first, second): (u32, u32)| Array {
            dtype: Dtype::U32,
            shape: vec![2],
            bytes: [first.to_le_bytes(), second.to_le_bytes()].concat(),
        };
        let (size, crop) = (pair(self.original_size), pair(self.crop));
        let english = self.english.as_ref();
        let student = self.student.as_ref();
        let arrays = [
            ("original_size", Some(&size)),
            ("crop", Some(&crop)),
            ("mean", Some(&self.mean)),
            ("log_variance", Some(&self.log_variance)),
            ("english.sequence", english.map(|states| &states.sequence)),
            ("english.pooled", english.and_then(|states| states.pooled.as_ref())),
            ("student.sequence", student.map(|states| &states.sequence)),
            ("student.mask", student.map(|states| &states.mask)),
        ];
        let views: Result<Vec<_>, _> = arrays.into_iter().filter_map(|(name, array)| Some(view(name, array?))).collect();
        views.and_then(|views| safetensors::serialize(views, None)).map_err(|error| Error::Cached(error.to_string()))
    }

    /// Reads a member and checks it for a bucket whose latents have this shape.
    ///
    /// # Errors
    /// [`Error::Cached`] if it is damaged or of another shape.
    pub fn parse(bytes: &[u8], latents: [usize; 3]) -> Result<Self> {
        let file = open(bytes)?;
        let find = |name: &str| file.tensor(name).ok().map(|view| array(&view));
        let need = |name: &str, is_right: &dyn Fn(&Array) -> bool| match find(name) {
            Some(array) if is_right(&array) => Ok(array),
            Some(Array { dtype, shape, .. }) => Err(Error::Cached(format!("{name} is {dtype:?} {shape:?}"))),
            None => Err(Error::Cached(format!("no {name}"))),
        };
        let is_real = |array: &Array| matches!(array.dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32);
        let is_latent = |array: &Array| is_real(array) && array.shape == latents;
        let is_sequence = |array: &Array| is_real(array) && array.shape.len() == 2;
        let is_row = |array: &Array| is_real(array) && array.shape.len() == 1;
        let english = file.tensor("english.sequence").is_ok().then(|| {
            let pooled = file.tensor("english.pooled").is_ok().then(|| need("english.pooled", &is_row)).transpose()?;
            Ok::<_, Error>(EnglishStates { sequence: need("english.sequence", &is_sequence)?, pooled })
        });
        let student = file.tensor("student.sequence").is_ok().then(|| {
            let sequence = need("student.sequence", &is_sequence)?;
            let is_mask = |array: &Array| array.dtype == Dtype::U8 && array.shape == sequence.shape[..1];
            Ok::<_, Error>(StudentStates { mask: need("student.mask", &is_mask)?, sequence })
        });
        Ok(Self {
            original_size: pair(&file, "original_size")?,
            crop: pair(&file, "crop")?,
            mean: need("mean", &is_latent)?,
            log_variance: need("log_variance", &is_latent)?,
            english: english.transpose()?,
            student: student.transpose()?,
        })
    }
}

/// Reads from a sample's numbers how large its picture was: width and height.
///
/// # Errors
/// [`Error::Cached`] if they are damaged.
pub fn original_size(bytes: &[u8]) -> Result<(u32, u32)> {
    match pair(&open(bytes)?, "original_size")? {
        (width, height) if width > 0 && height > 0 => Ok((width, height)),
        (width, height) => Err(Error::Cached(format!("a picture of {width} x {height} pixels"))),
    }
}

/// A skipped sample as it lies in the tar.
#[must_use]
pub fn skipped(skip: &Skip) -> Vec<u8> {
    skip.detail().into_bytes()
}

/// What [`skipped`] has written.
pub(crate) fn read_skipped(bytes: &[u8]) -> (Rule, String) {
    let text = String::from_utf8_lossy(bytes);
    let known = text.split_once(": ").and_then(|(name, words)| Some((Rule::named(name)?, words.to_owned())));
    known.unwrap_or_else(|| (Rule::BadCache, format!("skipped for a reason that is not known here: {text}")))
}

fn open(bytes: &[u8]) -> Result<SafeTensors<'_>> {
    SafeTensors::deserialize(bytes).map_err(|error| Error::Cached(format!("no whole safetensors file: {error}")))
}

fn view<'a>(name: &'a str, array: &'a Array) -> Result<(&'a str, TensorView<'a>), safetensors::SafeTensorError> {
    TensorView::new(array.dtype, array.shape.clone(), &array.bytes).map(|view| (name, view))
}

fn array(view: &TensorView<'_>) -> Array {
    Array { dtype: view.dtype(), shape: view.shape().to_vec(), bytes: view.data().to_vec() }
}

fn pair(file: &SafeTensors<'_>, name: &str) -> Result<(u32, u32)> {
    let view = file.tensor(name).map_err(|_| Error::Cached(format!("no {name}")))?;
    match *view.data() {
        [a, b, c, d, e, f, g, h] if view.dtype() == Dtype::U32 => Ok((u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]))),
        _ => Err(Error::Cached(format!("{name} is {:?} {:?}", view.dtype(), view.shape()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::cached_sample;

    #[test]
    fn samples_come_back_as_they_were_and_the_same_ones_are_the_same_bytes() {
        for with_text in [false, true] {
            let sample = cached_sample((70, 50), [4, 2, 3], with_text);
            let bytes = sample.to_bytes().unwrap();
            assert_eq!(CachedSample::parse(&bytes, [4, 2, 3]).unwrap(), sample);
            assert_eq!((original_size(&bytes).unwrap(), sample.to_bytes().unwrap()), ((70, 50), bytes));
        }
        let sd15 = EnglishStates { pooled: None, ..cached_sample((70, 50), [4, 2, 3], true).english.unwrap() };
        let sample = CachedSample { english: Some(sd15), student: None, ..cached_sample((70, 50), [4, 2, 3], true) };
        assert_eq!(CachedSample::parse(&sample.to_bytes().unwrap(), [4, 2, 3]).unwrap(), sample);
    }

    #[test]
    fn what_is_damaged_or_of_another_shape_is_refused_in_words() {
        let sample = cached_sample((70, 50), [4, 2, 3], true);
        let refuse = |bytes: &[u8]| CachedSample::parse(bytes, [4, 2, 3]).unwrap_err().to_string();
        let bytes = sample.to_bytes().unwrap();
        assert!(refuse(&bytes[..bytes.len() - 1]).starts_with("latents: no whole safetensors file"));
        assert!(refuse(b"").starts_with("latents: no whole safetensors file"));
        assert!(CachedSample::parse(&bytes, [4, 3, 2]).unwrap_err().to_string().ends_with("mean is F32 [4, 2, 3]"));
        let mut wrong = sample.clone();
        wrong.log_variance = Array { dtype: Dtype::F64, shape: vec![1], bytes: vec![0; 8] };
        assert_eq!(refuse(&wrong.to_bytes().unwrap()), "latents: log_variance is F64 [1]");
        let mut wrong = sample.clone();
        wrong.student.as_mut().unwrap().mask = Array { dtype: Dtype::U8, shape: vec![1], bytes: vec![1] };
        assert_eq!(refuse(&wrong.to_bytes().unwrap()), "latents: student.mask is U8 [1]");
        let other = safetensors::serialize([("mean", TensorView::new(Dtype::U8, vec![1], &[0]).unwrap())], None).unwrap();
        assert_eq!(original_size(&other).unwrap_err().to_string(), "latents: no original_size");
        let mut misfit = sample;
        misfit.mean.bytes.pop();
        assert!(misfit.to_bytes().is_err());
    }

    #[test]
    fn text_states_of_other_shapes_than_the_first_are_refused() {
        let shapes = TextShapes::default();
        let sample = cached_sample((70, 50), [4, 2, 3], true);
        assert!(shapes.check(&cached_sample((70, 50), [4, 2, 3], false)).is_ok(), "without any");
        assert!(shapes.check(&sample).is_ok() && shapes.check(&sample).is_ok());
        let refused = |change: fn(&mut CachedSample)| {
            let mut other = sample.clone();
            change(&mut other);
            shapes.check(&other).unwrap_err().to_string()
        };
        let words = refused(|sample| sample.student.as_mut().unwrap().sequence.shape = vec![7, 3]);
        assert_eq!(words, "latents: student.sequence is [7, 3], but [3, 7] in the first sample that was read");
        assert!(
            refused(|sample| sample.english.as_mut().unwrap().sequence.shape = vec![30, 1]).contains("english.sequence is Some([30, 1])")
        );
        assert!(refused(|sample| sample.english.as_mut().unwrap().pooled = None).contains("english.pooled is None"));
    }

    #[test]
    fn reasons_of_skipped_samples_come_back_by_rule() {
        for rule in Rule::ALL {
            let skip = Skip { index: 0, rule, key: "k".into(), words: "a: b".into() };
            assert_eq!(read_skipped(&skipped(&skip)), (rule, "a: b".into()));
        }
        assert_eq!(read_skipped(b"odd: words").0, Rule::BadCache);
    }
}
