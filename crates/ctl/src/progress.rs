//! What is shown while a migration runs: a bar on a terminal, a line a second elsewhere, objects for scripts.
//! All but JSON goes to standard error, so that standard output holds the result alone.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use dwcp_proto::units;
use dwcp_rpc::v1::{self, Phase};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::error::one_line;
use crate::json;
use crate::show;

/// Steps of the bar.
const STEPS: u64 = 1000;
/// Time between two lines, or two objects, while the phase stays the same.
const LINE_EVERY: Duration = Duration::from_secs(1);

/// Where progress is shown.
#[derive(Debug)]
pub(crate) enum Display {
    Json(Pacer),
    Lines(Pacer),
    Bar(ProgressBar),
}

impl Display {
    /// JSON if asked for, else what standard error is good for.
    pub(crate) fn new(json: bool) -> Self {
        match (json, std::io::stderr().is_terminal()) {
            (true, _) => Display::Json(Pacer::default()),
            (false, false) => Display::Lines(Pacer::default()),
            (false, true) => Display::Bar(bar()),
        }
    }

    /// Shows how far it is.
    pub(crate) fn update(&mut self, status: &v1::Status) {
        match self {
            Display::Json(pacer) => {
                if pacer.due(status) {
                    json::print(&json::status(status));
                }
            }
            Display::Lines(pacer) => {
                if pacer.due(status) {
                    eprintln!("{:3.0} %  {}", 100.0 * fraction(status), detail(status));
                }
            }
            Display::Bar(bar) => {
                // The agent's fraction never falls; held here too, since this is what the operator sees.
                bar.set_position(bar.position().max((STEPS as f64 * fraction(status)) as u64));
                bar.set_message(detail(status));
            }
        }
    }

    /// Says something in between, without breaking the bar.
    pub(crate) fn note(&self, text: &str) {
        match self {
            Display::Bar(bar) => bar.println(text),
            Display::Json(_) | Display::Lines(_) => eprintln!("{text}"),
        }
    }

    /// Shows the end: the last object, or the summary.
    pub(crate) fn finish(&mut self, status: &v1::Status) {
        match self {
            Display::Json(_) => json::print(&json::status(status)),
            Display::Lines(_) => show::summary(status),
            Display::Bar(bar) => {
                bar.finish_and_clear();
                show::summary(status);
            }
        }
    }
}

/// Lets one status a second pass, and the first of each phase.
#[derive(Debug, Default)]
pub(crate) struct Pacer(Option<(Instant, Phase)>);

impl Pacer {
    fn due(&mut self, status: &v1::Status) -> bool {
        let now = Instant::now();
        let due = self.0.is_none_or(|(last, phase)| phase != status.phase() || now - last >= LINE_EVERY);
        if due {
            self.0 = Some((now, status.phase()));
        }
        due
    }
}

fn bar() -> ProgressBar {
    let style = ProgressStyle::with_template("[{bar:24}] {percent:>3} %  {wide_msg}")
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ");
    let bar = ProgressBar::with_draw_target(Some(STEPS), ProgressDrawTarget::stderr_with_hz(10));
    bar.set_style(style);
    bar
}

fn fraction(status: &v1::Status) -> f64 {
    status.progress.map_or(0.0, |p| p.fraction).clamp(0.0, 1.0)
}

/// Path and phase, rate, round, remaining, ETA: what there is of them.
fn detail(status: &v1::Status) -> String {
    let progress = status.progress.unwrap_or_default();
    let path = match (&status.path, &status.mode) {
        (Some(path), Some(mode)) => format!("{path} {mode} "),
        (Some(path), None) => format!("{path} "),
        _ => String::new(),
    };
    let mut parts = vec![one_line(&format!("{path}{}", json::phase(status.phase()).replace('_', " ")))];
    if matches!(status.phase(), Phase::Precopy | Phase::Switchover) {
        parts.push(units::rate(progress.wire_rate));
        parts.push(format!("round {}", status.rounds));
        parts.push(format!("{} left", units::size(progress.remaining_bytes)));
    }
    if status.phase() == Phase::Precopy {
        parts.push(match progress.eta_seconds {
            Some(seconds) => format!("ETA {}", show::seconds(seconds)),
            // In the first round there is no estimate yet; later it means that the guest writes faster than the link.
            None if status.rounds <= 1 => "ETA unknown".to_owned(),
            None => "does not converge yet".to_owned(),
        });
    }
    parts.join("  ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(phase: Phase, fraction: f64, eta: Option<f64>) -> v1::Status {
        let progress = v1::Progress {
            fraction,
            remaining_bytes: 3 << 29,
            wire_rate: 25_000_000.0,
            eta_seconds: eta,
            dirty_rate: None,
        };
        let (path, mode) = (Some("v3".to_owned()), Some("internet".to_owned()));
        v1::Status {
            phase: phase.into(),
            rounds: 2,
            path,
            mode,
            progress: Some(progress),
            ..Default::default()
        }
    }

    #[test]
    fn a_line_has_rate_round_remaining_and_eta() {
        assert_eq!(
            detail(&status(Phase::Precopy, 0.5, Some(12.3))),
            "v3 internet precopy  200.0 Mbit/s  round 2  1.5 GiB left  ETA 12 s"
        );
        assert!(detail(&status(Phase::Precopy, 0.5, None)).ends_with("does not converge yet"));
        assert_eq!(detail(&status(Phase::Handover, 1.0, None)), "v3 internet handover");
    }

    #[test]
    fn the_bar_never_runs_backwards() {
        let mut display =
            Display::Bar(ProgressBar::with_draw_target(Some(STEPS), ProgressDrawTarget::hidden()));
        for fraction in [0.1, 0.6, 0.4, f64::NAN, 7.0, 0.2] {
            let Display::Bar(bar) = &display else { unreachable!() };
            let before = bar.position();
            display.update(&status(Phase::Precopy, fraction, None));
            let Display::Bar(bar) = &display else { unreachable!() };
            assert!(before <= bar.position() && bar.position() <= STEPS);
        }
    }

    #[test]
    fn a_phase_is_shown_at_once_and_then_once_a_second() {
        let mut pacer = Pacer::default();
        assert!(pacer.due(&status(Phase::Precopy, 0.1, None)));
        assert!(!pacer.due(&status(Phase::Precopy, 0.2, None)));
        assert!(pacer.due(&status(Phase::Switchover, 0.3, None)));
    }
}
