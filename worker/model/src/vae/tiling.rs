//! Decoding with less memory: picture by picture, or tile by tile.

use tch::Tensor;

use super::Vae;
use crate::{Error, Result};

/// Share of a tile's side that it has in common with its neighbour.
const OVERLAP: f64 = 0.25;

/// How much is decoded at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Decoding {
    /// The whole batch.
    #[default]
    Whole,
    /// One picture after the other.
    OneByOne,
    /// Square tiles of this many latents a side, which overlap by a quarter and are blended there. The group norms see a tile only: colours
    /// may shift slightly between distant tiles.
    Tiled(i64),
}

impl Decoding {
    /// Tiles of the usual side, which fit into the memory of any device.
    pub const BY_TILES: Self = Self::Tiled(64);
}

impl Vae {
    /// Decodes as [`Vae::decode`] does, with as much memory as `decoding` takes.
    ///
    /// Errors: [`Error::Shape`], also for tiles without a side.
    pub fn decode_by(&self, latents: &Tensor, decoding: Decoding) -> Result<Tensor> {
        let size = latents.size();
        let one_by_one = |decode: &dyn Fn(&Tensor) -> Result<Tensor>| -> Result<Tensor> {
            let pictures: Vec<Tensor> = (0..size[0]).map(|row| decode(&latents.narrow(0, row, 1))).collect::<Result<_>>()?;
            Ok(Tensor::f_cat(&pictures, 0)?)
        };
        match decoding {
            Decoding::Tiled(side) if side < 2 => Err(Error::Shape { what: "Vae::decode", detail: format!("tiles of {side} latents") }),
            Decoding::Whole => self.decode(latents),
            _ if size.len() != 4 || size[0] < 1 => self.decode(latents),
            Decoding::OneByOne => one_by_one(&|latents| self.decode(latents)),
            Decoding::Tiled(side) if size[2] <= side && size[3] <= side => one_by_one(&|latents| self.decode(latents)),
            Decoding::Tiled(side) => one_by_one(&|latents| self.decode_tiles(latents, side)),
        }
    }

    /// Decodes one picture tile by tile, each blended into what lies above it and to its left.
    ///
    /// Source: `AutoencoderKL.tiled_decode` of diffusers.
    fn decode_tiles(&self, latents: &Tensor, side: i64) -> Result<Tensor> {
        let (_, _, height, width) = latents.size4()?;
        let pixels = side * self.downscale();
        let pitch = ((side as f64 * (1.0 - OVERLAP)) as i64).max(1);
        let blended = (pixels as f64 * OVERLAP) as i64;
        let kept = pixels - blended;

        let starts = |length: i64| (0..length).step_by(usize::try_from(pitch).unwrap_or(1));
        let mut rows = Vec::new();
        let mut above: Vec<Tensor> = Vec::new();
        for top in starts(height) {
            // Tiles are blended into their neighbours as those are after their own blending.
            let mut finished: Vec<Tensor> = Vec::new();
            for (column, left) in starts(width).enumerate() {
                let tile = latents.f_narrow(2, top, side.min(height - top))?.f_narrow(3, left, side.min(width - left))?;
                let mut tile = self.decode(&tile)?;
                if let Some(above) = above.get(column) {
                    tile = blend(above, &tile, 2, blended)?;
                }
                if let Some(left) = finished.last() {
                    tile = blend(left, &tile, 3, blended)?;
                }
                finished.push(tile);
            }
            let crop = |tile: &Tensor, dimension: i64| tile.f_narrow(dimension, 0, kept.min(tile.size()[dimension as usize]));
            let cropped: Vec<Tensor> = finished.iter().map(|tile| Ok(crop(&crop(tile, 2)?, 3)?)).collect::<Result<_>>()?;
            rows.push(Tensor::f_cat(&cropped, 3)?);
            above = finished;
        }
        Ok(Tensor::f_cat(&rows, 2)?)
    }
}

/// Fades from the end of `before` into the beginning of `tile` along a dimension, over `extent` pixels.
fn blend(before: &Tensor, tile: &Tensor, dimension: i64, extent: i64) -> Result<Tensor> {
    let length = |tensor: &Tensor| tensor.size()[dimension as usize];
    let extent = extent.min(length(before)).min(length(tile));
    let mut shape = [1i64; 4];
    shape[dimension as usize] = extent;
    let share = Tensor::f_arange(extent, (tile.kind(), tile.device()))?.f_div_scalar(extent.max(1))?.f_view(shape)?;
    let end = before.f_narrow(dimension, length(before) - extent, extent)?;
    let beginning = tile.f_narrow(dimension, 0, extent)?;
    let faded = end.f_add(&beginning.f_sub(&end)?.f_mul(&share)?)?;
    Ok(Tensor::f_cat(&[faded, tile.f_narrow(dimension, extent, length(tile) - extent)?], dimension)?)
}
