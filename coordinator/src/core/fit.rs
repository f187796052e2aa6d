//! Whether a job and its data fit each other, as far as counts tell. Training goes on with what is left, so it is said, and once.

use peapod_proto::message::StepRecord;

use super::{Core, Effect, Notice};

/// Samples that are judged at least.
const BASE: u64 = 100;
/// The rule for pairs of captions of which one is missing.
const ONE_SIDED: &str = "one_sided";

/// What was seen since this coordinator was started.
#[derive(Debug, Clone, Default)]
pub(super) struct Fit {
    /// Samples that were trained, while all of them were native.
    num_native: u64,
    has_pairs: bool,
    told_filtered: bool,
    told_pairs: bool,
}

impl Fit {
    /// A step is final.
    pub fn trained(&mut self, record: &StepRecord) {
        self.num_native += u64::from(record.native);
        self.has_pairs |= (record.native as usize) < record.names.len();
    }
}

impl Core {
    /// Says that most samples are filtered out, or that none is a pair of captions, once that is so.
    pub(super) fn look_at_fit(&mut self, out: &mut Vec<Effect>) {
        let totals = self.ledger.totals();
        // Counting what was read takes longer: it is at least what is accounted for.
        if !self.fit.told_filtered && 2 * totals.filtered > totals.seen().max(BASE) {
            let num_read = self.ledger.num_read();
            if 2 * totals.filtered > num_read.max(BASE) {
                self.fit.told_filtered = true;
                let rules = self.ledger.rules().filtered;
                out.push(Effect::Notice(Notice::MostlyFiltered { num_filtered: totals.filtered, num_read, rules }));
            }
        }
        let Fit { num_native, has_pairs, told_filtered, told_pairs } = self.fit;
        if has_pairs || told_filtered || told_pairs || num_native < BASE {
            return;
        }
        let num_one_sided = self.ledger.rules().filtered.get(ONE_SIDED).copied().unwrap_or_default();
        if num_one_sided >= BASE {
            self.fit.told_pairs = true;
            out.push(Effect::Notice(Notice::NoPairs { num_one_sided, num_native }));
        }
    }
}
