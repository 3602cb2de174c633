//! How a QUIC connection fares: what its congestion controller is told, noted on the way. quinn's own figures have
//! neither what was acknowledged nor whether anything is.

use std::any::Any;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use quinn::congestion::{
    BbrConfig, Controller as Control, ControllerFactory, ControllerMetrics, CubicConfig, NewRenoConfig,
};
use quinn_proto::RttEstimator;

use super::Controller;

/// The least time over which a rate is taken: acknowledgements come in bursts.
const STRETCH: Duration = Duration::from_millis(20);
/// A peer acknowledges within this time beyond the round trip (RFC 9000, section 18.2).
const ACK_DELAY: Duration = Duration::from_millis(25);
/// Without an acknowledgement for less than this nothing is said to be tried in vain, as TCP's least timer has it.
const LEAST_SILENCE: Duration = Duration::from_millis(600);

/// What is known of a connection. Cheap to clone; all clones are of the same connection.
#[derive(Debug, Clone)]
pub(crate) struct Figures {
    pub(super) controller: Controller,
    noted: Arc<Mutex<Noted>>,
}

/// Invariants: `since` and `stretch` are set exactly while something is in flight; `rate` and `strained` only tell of such times.
#[derive(Debug, Default)]
struct Noted {
    acked: u64,
    in_flight: u64,
    /// The last acknowledgement, or the first packet sent since nothing was in flight.
    since: Option<Instant>,
    /// Where the stretch began over which the next rate is taken, and what was acknowledged then.
    stretch: Option<(Instant, u64)>,
    rtt: Duration,
    rate: u64,
    strained: Duration,
}

impl Figures {
    fn noted(&self) -> MutexGuard<'_, Noted> {
        self.noted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes acknowledged since the start.
    pub(super) fn acked(&self) -> u64 {
        self.noted().acked
    }

    /// The last rate of acknowledgement, bytes a second.
    pub(super) fn rate(&self) -> u64 {
        self.noted().rate
    }

    /// How long there was something to send and only congestion control held it up.
    pub(super) fn strained(&self) -> Duration {
        self.noted().strained
    }

    /// Whether nothing was acknowledged for as long as two tries in vain take: each waits twice as long as the one before.
    pub(super) fn backs_off(&self, now: Instant) -> bool {
        let noted = self.noted();
        // A try waits for some two round trips: the smoothed one and four times its deviation.
        let patience = ((noted.rtt * 2 + ACK_DELAY) * 3).max(LEAST_SILENCE);
        noted.since.is_some_and(|since| now.saturating_duration_since(since) >= patience)
    }
}

impl Noted {
    fn sent(&mut self, now: Instant, bytes: u64) {
        self.in_flight += bytes;
        self.since.get_or_insert(now);
        self.stretch.get_or_insert((now, self.acked));
    }

    fn acked(&mut self, bytes: u64, rtt: Duration) {
        self.acked += bytes;
        self.in_flight = self.in_flight.saturating_sub(bytes);
        self.rtt = rtt;
    }

    /// A batch of acknowledgements is over, and so much is still in flight.
    fn heard(&mut self, now: Instant, in_flight: u64, starved: bool) {
        if let (Some(since), false) = (self.since, starved) {
            self.strained += now.saturating_duration_since(since);
        }
        if let Some((begun, acked)) = self.stretch {
            let time = now.saturating_duration_since(begun);
            if time >= self.rtt.max(STRETCH) {
                self.rate = ((self.acked - acked) as f64 / time.as_secs_f64()) as u64;
                self.stretch = Some((now, self.acked));
            }
        }
        self.in_flight = in_flight;
        match in_flight {
            0 => (self.since, self.stretch) = (None, None),
            _ => self.since = Some(now),
        }
    }
}

/// Makes the controller of one connection.
pub(super) struct Factory {
    figures: Figures,
    controls: Arc<dyn ControllerFactory + Send + Sync>,
}

impl Factory {
    pub(super) fn new(controller: Controller) -> (Self, Figures) {
        let figures = Figures { controller, noted: Arc::default() };
        let controls: Arc<dyn ControllerFactory + Send + Sync> = match controller {
            Controller::Bbr => Arc::new(BbrConfig::default()),
            Controller::Cubic => Arc::new(CubicConfig::default()),
            Controller::NewReno => Arc::new(NewRenoConfig::default()),
        };
        (Factory { figures: figures.clone(), controls }, figures)
    }
}

impl ControllerFactory for Factory {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Control> {
        let control = self.controls.clone().build(now, current_mtu);
        Box::new(Noting { control, figures: self.figures.clone() })
    }
}

/// A congestion controller that notes what it is told.
struct Noting {
    control: Box<dyn Control>,
    figures: Figures,
}

impl Control for Noting {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.figures.noted().sent(now, bytes);
        self.control.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        self.figures.noted().acked(bytes, rtt.get());
        self.control.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest: Option<u64>) {
        self.figures.noted().heard(now, in_flight, app_limited);
        self.control.on_end_acks(now, in_flight, app_limited, largest);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, persistent: bool, lost_bytes: u64) {
        self.control.on_congestion_event(now, sent, persistent, lost_bytes);
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.control.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.control.window()
    }

    fn metrics(&self) -> ControllerMetrics {
        self.control.metrics()
    }

    fn clone_box(&self) -> Box<dyn Control> {
        Box::new(Noting { control: self.control.clone_box(), figures: self.figures.clone() })
    }

    fn initial_window(&self) -> u64 {
        self.control.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self.control.into_any()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_rate_is_taken_while_something_is_in_flight_and_silence_is_noticed() {
        let (factory, figures) = Factory::new(Controller::Cubic);
        let start = Instant::now();
        let mut noted = factory.figures.noted();
        noted.sent(start, 3000);
        for n in 1..=2 {
            noted.acked(1000, MS * 10);
            noted.heard(start + MS * 20 * n, 3000 - 1000 * u64::from(n), n == 2);
        }
        assert_eq!((noted.rate, noted.strained), (50_000, MS * 20));
        drop(noted);
        let last = start + MS * 40;
        assert!(!figures.backs_off(last + LEAST_SILENCE / 2));
        assert!(figures.backs_off(last + LEAST_SILENCE));
        // A pause with nothing in flight is neither slow nor silent.
        let mut noted = figures.noted();
        noted.acked(1000, MS * 10);
        noted.heard(last + MS * 700, 0, true);
        let rate = noted.rate;
        drop(noted);
        assert!(!figures.backs_off(last + MS * 100_000));
        figures.noted().sent(last + MS * 100_000, 1000);
        assert_eq!((figures.rate(), figures.acked()), (rate, 3000));
        assert!(!figures.backs_off(last + MS * 100_001));
    }

    #[test]
    fn a_long_round_trip_has_longer_patience() {
        let (_, figures) = Factory::new(Controller::Bbr);
        let start = Instant::now();
        figures.noted().sent(start, 2000);
        figures.noted().acked(1000, MS * 300);
        figures.noted().heard(start, 1000, false);
        assert!(!figures.backs_off(start + LEAST_SILENCE));
        assert!(figures.backs_off(start + MS * 1875));
    }
}
