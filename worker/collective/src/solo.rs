//! A world of one.

use std::time::Instant;

use crate::{AbortHandle, Collective, Error, Values};

/// The communicator of a world with a single member: a sum over one is the data itself, so nothing is sent and nothing waits.
#[derive(Debug)]
pub struct SoloCollective {
    abort: AbortHandle,
    failure: Option<String>,
}

impl SoloCollective {
    /// Makes the communicator; `abort` ends it.
    pub fn new(abort: AbortHandle) -> Self {
        Self { abort, failure: None }
    }

    fn check(&self) -> Result<(), Error> {
        self.abort.check()?;
        match &self.failure {
            None => Ok(()),
            Some(first) => Err(Error::Poisoned { first: first.clone() }),
        }
    }
}

impl Collective for SoloCollective {
    fn member_index(&self) -> u32 {
        0
    }

    fn num_members(&self) -> u32 {
        1
    }

    fn all_reduce_sum_in(&mut self, _values: Values<'_>, _deadline: Instant) -> Result<(), Error> {
        self.check()
    }

    fn sums_on_device(&self) -> bool {
        true
    }

    fn broadcast(&mut self, _data: &mut [u8], root: u32, _deadline: Instant) -> Result<(), Error> {
        self.check()?;
        check_root(root, 1).inspect_err(|error| self.failure = Some(error.to_string()))
    }

    fn barrier(&mut self, _deadline: Instant) -> Result<(), Error> {
        self.check()
    }

    fn abort_handle(&self) -> AbortHandle {
        self.abort.clone()
    }
}

/// Refuses a broadcast from nobody.
pub(crate) fn check_root(root: u32, num_members: u32) -> Result<(), Error> {
    if root < num_members {
        return Ok(());
    }
    Err(Error::InvalidArgument { reason: format!("broadcast from member {root} in a world of {num_members}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(num_members: u32) -> Vec<Box<dyn Collective>> {
        assert_eq!(num_members, 1);
        vec![Box::new(SoloCollective::new(AbortHandle::new()))]
    }

    crate::conformance_suite!(world, [1]);
}
