//! The scores of a comparison, a line a column on standard output.

use std::io::{self, Write};

use anyhow::Context;
use peapod_model::text::ClipScorer;
use peapod_proto::program::nobody_reads;
use peapod_worker::grid::Row;
use peapod_worker::score::similarity;
use tch::{Device, Kind, Tensor};

use crate::plan::Plan;

/// Says for each column how alike its pictures are to the teacher's (the first column's) and, with a CLIP, how well they show what the
/// English says (CLIPScore, 0 to 100) and how alike CLIP finds them to the teacher's (cosine).
pub fn print(plan: &Plan, rows: &[Row], device: Device) -> anyhow::Result<()> {
    let judge = plan.clip.as_deref().map(|path| ClipScorer::load(path, Kind::Float, device)).transpose().context("cannot load --clip")?;
    let english: Vec<&str> = plan.asked.iter().map(|asked| asked.english.as_deref().unwrap_or(&asked.prompt)).collect();
    let texts = judge.as_ref().map(|judge| judge.texts(&english)).transpose()?;
    let mut teacher: Option<Tensor> = None;
    for (column, title) in plan.titles.iter().enumerate() {
        let mut scores = Vec::new();
        if column > 0 {
            let alike = rows.iter().filter_map(|row| similarity(row.pictures.first()?, row.pictures.get(column)?));
            scores.push(format!("similarity {:.4}", mean(alike)));
        }
        if let (Some(judge), Some(texts)) = (&judge, &texts) {
            let images = embed(judge, rows, column)?;
            scores.push(format!("CLIPScore {:.2}", ClipScorer::scores(&images, texts)?.mean(Kind::Float).double_value(&[])));
            match &teacher {
                None => teacher = Some(images),
                Some(teacher) => {
                    let cosines = images.f_mul(teacher)?.f_sum_dim_intlist(-1, false, Kind::Float)?;
                    scores.push(format!("CLIP similarity {:.4}", cosines.mean(Kind::Float).double_value(&[])));
                }
            }
        }
        if !scores.is_empty() {
            match writeln!(io::stdout(), "{title}\t{}", scores.join("\t")) {
                Err(error) if nobody_reads(&error) => return Ok(()),
                printed => printed.context("cannot print the scores")?,
            }
        }
    }
    Ok(())
}

/// CLIP's embeddings of a column's pictures, one by one: a CLIP is small, a hundred pictures at once are not.
fn embed(judge: &ClipScorer, rows: &[Row], column: usize) -> anyhow::Result<Tensor> {
    let pictures = rows.iter().filter_map(|row| row.pictures.get(column));
    let embedded = pictures.map(|picture| {
        let size = [1, i64::from(picture.height()), i64::from(picture.width()), 3];
        judge.images(&Tensor::from_data_size(picture.rgb(), &size, Kind::Uint8))
    });
    Ok(Tensor::f_cat(&embedded.collect::<Result<Vec<_>, _>>()?, 0)?)
}

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0.0), |(sum, count), value| (sum + value, count + 1.0));
    sum / f64::max(count, 1.0)
}
