//! Waiting for a condition, never for a time.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How often a condition is looked at.
const PERIOD: Duration = Duration::from_millis(10);

/// Looks at `condition` until it gives a value.
///
/// # Errors
/// The condition's own error at once; or, after `limit`, one that names `what` was waited for.
pub fn until<T>(what: &str, limit: Duration, mut condition: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = condition()? {
            return Ok(value);
        }
        if start.elapsed() >= limit {
            bail!("waited {:.1} s for {what}, in vain", limit.as_secs_f64());
        }
        std::thread::sleep(PERIOD);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_ends_with_the_value_the_error_or_the_deadline() {
        let mut looks = 0;
        let third = until("three looks", Duration::from_secs(5), || {
            looks += 1;
            Ok((looks == 3).then_some(looks))
        });
        assert_eq!(third.unwrap(), 3);
        assert_eq!(
            until::<()>("nothing", Duration::from_secs(5), || bail!("no")).unwrap_err().to_string(),
            "no"
        );
        let late = until::<()>("rain", Duration::ZERO, || Ok(None)).unwrap_err().to_string();
        assert_eq!(late, "waited 0.0 s for rain, in vain");
    }
}
