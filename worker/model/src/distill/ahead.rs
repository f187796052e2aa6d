//! What of a micro-batch does not depend on the adapter, computed before its step.

use tch::{Tensor, no_grad_guard};

use super::batch::{English, Images, MicroBatch, Prompts};
use super::{Distiller, encode_pixels};
use crate::Result;
use crate::text::Conditioning;
use crate::transfer::send;

impl Distiller {
    /// Puts what the frozen encoders say in place of a batch's pictures and captions, as its step would compute it. What is encoded already
    /// stays, and so do captions of a student whose encoder drops elements, which differ from step to step.
    ///
    /// Errors: those of the encoders; what was encoded until then is as good as what was not.
    pub fn encode_ahead(&self, batch: &mut MicroBatch) -> Result<()> {
        let _guard = no_grad_guard();
        let flags = self.check(batch)?;
        if let Images::Pixels(pixels) = &batch.images {
            let pixels = send(pixels, self.device)?;
            batch.images = Images::Moments(encode_pixels(&self.vae, &pixels, self.config.vae_round_fp16)?);
        }
        if let (English::Captions(captions), Some(teacher)) = (&batch.english, &self.teacher) {
            let is_taught = |&index: &usize| !(self.config.hybrid && flags.native[index]);
            let taught: Vec<usize> = (0..batch.len()).filter(is_taught).collect();
            if !taught.is_empty() {
                let captions: Vec<&str> = taught.iter().map(|&index| captions[index].as_str()).collect();
                let Conditioning { sequence, pooled, .. } = teacher.encoders.encode(&captions)?;
                let rows = Tensor::from_slice(&taught.iter().map(|&index| index as i64).collect::<Vec<_>>());
                let rows = send(&rows, self.device)?;
                let spread = |states: &Tensor| spread(states, &rows, batch.len());
                let (sequence, pooled) = (spread(&sequence)?, pooled.as_ref().map(spread).transpose()?);
                batch.english = English::States(Conditioning { sequence, pooled, mask: None });
            }
        }
        if let Prompts::Captions(captions) = &batch.prompts
            && !self.student.drops()
        {
            batch.prompts = Prompts::States { sequence: self.student.encode(captions)?, mask: self.student.token_mask(captions)? };
        }
        Ok(())
    }
}

/// The rows of some samples at their places among `num_samples`; the others are zero, and nobody reads them.
fn spread(states: &Tensor, rows: &Tensor, num_samples: usize) -> Result<Tensor> {
    let mut size = states.size();
    if size[0] == num_samples as i64 {
        return Ok(states.shallow_clone());
    }
    size[0] = num_samples as i64;
    Ok(Tensor::f_zeros(&size, (states.kind(), states.device()))?.f_index_copy_(0, rows, states)?)
}
