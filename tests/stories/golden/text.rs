//! Tokenizers and text encoders.

use peapod_model::source::ModelSource;
use peapod_model::text::{BertEncoder, ClipTextEncoder, StudentEncoder, StudentOptions, TextTokenizer};
use tch::{Device, Kind, Tensor};

use super::{Case, Place, Result, Tensors};

/// The token ids of texts.
pub fn tokenizer(case: &Case) -> Result<Tensors> {
    let (folder, length) = (case.path("tokenizer")?, case.setting("length")?);
    let tokenizer = match case.setting::<String>("kind")?.as_str() {
        "clip" => TextTokenizer::clip(&folder, length)?,
        "bert" => TextTokenizer::bert(&folder, length)?,
        "roberta" => TextTokenizer::roberta(&folder, length)?,
        "xlm_roberta" => TextTokenizer::xlm_roberta(&folder, length)?,
        "t5" => TextTokenizer::t5(&folder, length)?,
        other => return Err(format!("kind = {other:?} is not known").into()),
    };
    let ids = tokenizer.encode(&case.setting::<Vec<String>>("texts")?)?;
    Ok([("ids".to_owned(), stacked(&ids))].into())
}

/// The token ids of texts in CLIP's published vocabulary, padded in several ways.
pub fn tokenizer_published(case: &Case) -> Result<Tensors> {
    let (length, texts): (_, Vec<String>) = (case.setting("length")?, case.setting("texts")?);
    let padded = |pad: i64| Ok((format!("ids.{pad}"), stacked(&TextTokenizer::clip_published(pad, length)?.encode(&texts)?)));
    case.setting::<Vec<i64>>("pads")?.into_iter().map(padded).collect()
}

/// The states of one CLIP text encoder for given ids.
pub fn clip_text(case: &Case) -> Result<Tensors> {
    let encoder = ClipTextEncoder::load(&case.path("model")?, case.place.kind, case.place.device)?;
    let states = encoder.forward(&ids(case)?)?;
    let named = [("penultimate", states.penultimate), ("last", states.last), ("pooled", states.pooled)];
    Ok(named.map(|(name, tensor)| (name.into(), tensor)).into())
}

/// The states of a BERT encoder for given ids, some of them padding.
pub fn bert_text(case: &Case) -> Result<Tensors> {
    let encoder = BertEncoder::load(&case.path("model")?, case.place.kind, case.place.device)?;
    Ok([("last".to_owned(), encoder.forward(&ids(case)?, case.setting("pad_id")?)?)].into())
}

/// The token states of a student encoder of any kind, for texts as users write them; Chinese-CLIP's are projected where the case says so.
pub fn student(case: &Case) -> Result<Tensors> {
    let project = case.settings.contains_key("project") && case.setting("project")?;
    let normalize_quotes = case.setting("normalize_quotes")?;
    let options = StudentOptions { normalize_quotes, project, ..StudentOptions::new(case.place.kind, case.place.device) };
    let student = StudentEncoder::load(&case.path("student")?, case.setting("context_length")?, options)?;
    Ok([("states".to_owned(), student.encode(&case.setting::<Vec<String>>("texts")?)?)].into())
}

/// The token ids a student encoder of one part computes with, for texts as users write them.
pub fn student_ids(case: &Case) -> Result<Tensors> {
    let options = StudentOptions { normalize_quotes: case.setting("normalize_quotes")?, ..StudentOptions::new(Kind::Float, Device::Cpu) };
    let student = StudentEncoder::load(&case.path("student")?, case.setting("context_length")?, options)?;
    let [rows] = <[_; 1]>::try_from(student.token_ids(&case.setting::<Vec<String>>("texts")?)?).map_err(|_| "a pair of encoders")?;
    Ok([("ids".to_owned(), stacked(&rows))].into())
}

/// What both roads tell the UNet about prompts: English through SDXL's encoders, Chinese through the student's.
pub fn prompts(case: &Case) -> Result<Tensors> {
    let Place { kind, device } = case.place;
    let english = ModelSource::open(&case.path("model")?, None)?.english(kind, device)?;
    let states = english.encode(&case.setting::<Vec<String>>("english")?)?;
    let options = StudentOptions { normalize_quotes: false, ..StudentOptions::new(kind, device) };
    let student = StudentEncoder::load(&case.path("student")?, case.setting("context_length")?, options)?;
    let student = student.encode(&case.setting::<Vec<String>>("captions")?)?;
    let named = [("english.sequence", states.sequence), ("english.pooled", states.pooled.unwrap_or_default()), ("student", student)];
    Ok(named.map(|(name, tensor)| (name.into(), tensor)).into())
}

fn ids(case: &Case) -> Result<Vec<Vec<i64>>> {
    Ok(Vec::try_from(case.input("ids")?)?)
}

fn stacked(ids: &[Vec<i64>]) -> Tensor {
    let rows: Vec<Tensor> = ids.iter().map(|row| Tensor::from_slice(row)).collect();
    Tensor::stack(&rows, 0)
}
