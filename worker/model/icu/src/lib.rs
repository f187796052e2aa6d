//! The one part of the crate `icu` that `plsfix`, which repairs broken text, takes from it: Unicode's normal forms.
//!
//! The crate itself brings calendars, collations and time zones of the whole world with it, a minute of compiling that nothing here uses.

pub use icu_normalizer as normalizer;
