//! What pictures are made from, and steered by, beside their prompts.

use tch::{Kind, Tensor};

use crate::controlnet::ControlNet;
use crate::vae::Vae;
use crate::{Error, Result};

/// Channels of an inpainting UNet beyond those of the latents: the mask's.
const MASK_CHANNELS: i64 = 1;
/// From this value on a mask's pixel is drawn anew.
const MASK_THRESHOLD: f64 = 0.5;

/// The default makes pictures from noise alone, steered by nothing else.
#[derive(Default)]
pub struct Task<'a> {
    /// The noise to begin with, of each picture by its number, `[N, C, h, w]`; `None` draws it from the seed.
    pub noise: Option<Tensor>,
    /// The picture to start from.
    pub image: Option<StartImage>,
    /// What of that picture is drawn anew.
    pub inpaint: Option<Inpaint>,
    /// What shows the UNet an outline, a pose, a depth.
    pub control: Option<Control<'a>>,
}

/// A picture that others start from.
#[derive(Debug)]
pub struct StartImage {
    /// Its scaled latents, `[1, C, h, w]`, `f32`.
    pub latents: Tensor,
    /// Share of the steps that are made: 1 leaves little of it, 0 everything.
    pub strength: f64,
}

/// The part of a picture that is drawn anew.
#[derive(Debug)]
pub struct Inpaint {
    /// 1 where something is drawn, 0 where the picture stays; `[1, 1, h, w]`, `f32`.
    pub mask: Tensor,
    /// Scaled latents of the picture with that part blanked, `[1, C, h, w]`: inpainting UNets see them beside the mask.
    pub masked: Tensor,
}

/// A ControlNet and what it is shown.
pub struct Control<'a> {
    /// The network.
    pub network: &'a ControlNet,
    /// Its image, `[1, channels, H, W]` in [0, 1].
    pub image: Tensor,
    /// What its residuals are multiplied by.
    pub scale: f64,
}

impl StartImage {
    /// Encodes a picture. The latents are the mean of their distribution, which is too narrow to be seen.
    ///
    /// Shapes: `pixels` `[1, 3, H, W]` in [-1, 1]. Errors: those of [`Vae::encode`].
    pub fn encode(vae: &Vae, pixels: &Tensor, strength: f64) -> Result<Self> {
        Ok(Self { latents: encode(vae, pixels)?, strength })
    }
}

impl Inpaint {
    /// Prepares a mask, and the picture without what is below it.
    ///
    /// Shapes: `pixels` `[1, 3, H, W]` in [-1, 1], `mask` `[1, 1, H, W]` in [0, 1]: from a half on, drawn anew.
    /// Errors: [`Error::Shape`] for a mask of another size, and those of [`Vae::encode`].
    pub fn encode(vae: &Vae, pixels: &Tensor, mask: &Tensor) -> Result<Self> {
        let (size, mask_size) = (pixels.size(), mask.size());
        if size.len() != 4 || mask_size != [1, 1, size[2], size[3]] {
            return Err(Error::Shape { what: "mask", detail: format!("{mask_size:?} for a picture of {size:?}") });
        }
        let mask = mask.f_ge(MASK_THRESHOLD)?.f_to_kind(Kind::Float)?;
        let masked = encode(vae, &pixels.f_mul(&mask.f_mul_scalar(-1.0)?.f_add_scalar(1.0)?)?)?;
        let factor = vae.downscale();
        // As the published pipelines do it: the upper left pixel of each latent's square speaks for it.
        let mask = mask.f_upsample_nearest2d([size[2] / factor, size[3] / factor], None, None)?;
        Ok(Self { mask, masked })
    }
}

fn encode(vae: &Vae, pixels: &Tensor) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    Ok(vae.encode(pixels)?.mean.f_mul_scalar(vae.scaling_factor())?)
}

/// How an inpainting task reaches the UNet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Inpainting {
    /// There is none.
    Nothing,
    /// The UNet is an ordinary one: what stays is put back after each step.
    Blended,
    /// The UNet sees mask and masked picture as channels of their own.
    Channels,
}

impl Task<'_> {
    /// Compares the task with the UNet's input channels.
    ///
    /// Errors: [`Error::Unsupported`] for an inpainting UNet without a mask, a mask without a picture, or a UNet with other channels.
    pub(super) fn inpainting(&self, in_channels: i64, latent_channels: i64) -> Result<Inpainting> {
        let unsupported = |what: &str, hint: &str| Err(Error::Unsupported { what: what.into(), hint: hint.into() });
        let inpaints = in_channels == 2 * latent_channels + MASK_CHANNELS;
        match (&self.inpaint, &self.image) {
            (Some(_), None) => unsupported("a mask without a picture", "give the picture that the mask is for"),
            (Some(_), Some(_)) if inpaints => Ok(Inpainting::Channels),
            (Some(_), Some(_)) if in_channels == latent_channels => Ok(Inpainting::Blended),
            (None, _) if in_channels == latent_channels => Ok(Inpainting::Nothing),
            (None, _) if inpaints => unsupported("an inpainting UNet without a mask", "give a picture and a mask"),
            _ => unsupported(&format!("a UNet of {in_channels} input channels"), &format!("{latent_channels} latents have a picture")),
        }
    }
}
