//! How a migration begins that has a session: QEMU is prepared, migrates into a socket of ours, and the data path and the task that asks
//! QEMU how far it is are started.

use std::pin::Pin;
use std::sync::Arc;

use dwcp_vmm::direct::Direct;
use dwcp_vmm::qmp::{MigrationInfo, Parameters, Qemu};
use dwcp_vmm::socket::{self, MigrationListener};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval};
use tracing::{Instrument, debug, warn};

use super::{Run, TICK};
use crate::counters::Counters;
use crate::error::{Blame, Failure};
use crate::guest::{Guest, open_failure, qmp_failure, socket_failure};
use crate::handshake::nonce;
use crate::source::breaker::Breaker;
use crate::source::carry::carry;
use crate::source::direct::{self, Rounds};
use crate::source::helm::Helm;
use crate::source::ingest::{self, IngestError, Inlet};
use crate::source::plan::not_direct;
use crate::source::reel::Reel;
use crate::status::Phase;

/// QEMU (8.2+) is told the measured rate anew when it has changed by this share.
const TELL_RATE: f64 = 0.1;
/// No limit, as QEMU understands it: what the agent takes is what bounds it.
pub(in crate::source) const UNLIMITED: u64 = 1 << 40;

impl Run {
    /// Lets QEMU migrate into our socket, and starts the data path.
    pub(super) async fn start(&mut self) -> Result<(), Failure> {
        let qemu = self.guest.reach().await.map_err(qmp_failure)?;
        let multifd = self.channels.is_multifd();
        let off = ["return-path", "xbzrle", "compress", "postcopy-ram", "x-ignore-shared", "x-colo"];
        let mut capabilities = vec![("events", true), ("late-block-activate", true), ("multifd", multifd)];
        capabilities.extend(off.map(|name| (name, false)));
        let unknown = qemu.set_capabilities(&capabilities).await.map_err(qmp_failure)?;
        if unknown.contains(&"events") {
            let text = "this QEMU does not report the migration's progress (capability events)";
            return Err(Failure::new("vmm_too_old", Blame::Vmm, text, "use QEMU 2.4 or newer"));
        }
        if multifd && unknown.contains(&"multifd") {
            let text = "this QEMU has no multifd";
            return Err(Failure::new(
                "vmm_too_old",
                Blame::Vmm,
                text,
                "leave --channels out, or use QEMU 4.0 or newer",
            ));
        }
        let parameters = Parameters {
            downtime_limit: Some(self.vmm_limit),
            max_bandwidth: Some(UNLIMITED),
            multifd_channels: multifd.then_some(self.channels.count()),
            multifd_compression: multifd.then(|| "none".to_owned()),
            // One way for all versions: zero pages on the main channel.
            zero_page_detection: multifd.then(|| "legacy".to_owned()),
            ..Parameters::default()
        };
        qemu.set_parameters(&parameters).await.map_err(qmp_failure)?;
        let (segments_tx, segments) = mpsc::channel(ingest::QUEUE);
        let chunk = ingest::chunk(self.outgoing.leg().mode, self.ram);
        let (last_tx, last) = oneshot::channel();
        let read: Pin<Box<dyn Future<Output = Result<u64, IngestError>> + Send>> =
            match self.directly(chunk).await {
                Some(ram) => {
                    let rounds = Rounds {
                        guest: self.guest.clone(),
                        segments: segments_tx,
                        report: self.report.clone(),
                        limit: self.vmm_limit,
                        last: last_tx,
                    };
                    Box::pin(direct::ingest(ram, rounds))
                }
                None => {
                    let inlet = match multifd {
                        true => Inlet::Channels(self.open_channels(&qemu).await?),
                        false => Inlet::Main(socket::open_outgoing(&qemu).await.map_err(open_failure)?),
                    };
                    let stream = Arc::new(inlet);
                    self.guest.writes_to(&stream);
                    self.stream = Some(stream.clone());
                    // QEMU writes from now on.
                    let _ = last_tx.send(());
                    Box::pin(ingest::ingest(stream, segments_tx, self.report.clone(), chunk))
                }
            };
        let Some(data) = self.data.take() else { return Ok(()) };
        let (Some(switches), Some(mode)) = (self.switches.take(), self.mode.take()) else { return Ok(()) };
        let (out, control) = (self.outgoing.clone(), self.control.clone());
        let (leg, config) = (out.leg(), &self.shared.config);
        let stopped = self.stopped.subscribe();
        let helm = Helm::new(
            leg.path,
            self.fixed,
            mode,
            config.gate.clone(),
            switches,
            stopped,
            Breaker::new(&config.limits),
        );
        let turns = self.turns_tx.clone();
        let carry = async move {
            let mut read = read;
            let send = carry(out, control, Reel::new(segments), data, helm, turns);
            tokio::pin!(send);
            tokio::select! {
                outcome = &mut send => outcome,
                // The end of the stream: whether it is a good one is the VMM's to say.
                read = &mut read => match read.err().and_then(IngestError::failure) {
                    Some(failure) => Err(failure),
                    None => send.await,
                },
            }
        };
        self.transport.spawn(carry.in_current_span());
        let counters = self.outgoing.counters.clone();
        self.monitor.spawn(monitor(self.guest.clone(), counters, self.info_tx.clone(), last));
        self.report.set(|s| s.phase = Phase::Precopy);
        let why = self.report.status().transport_reason.unwrap_or_default();
        self.pilot.note("precopy", format!("over {}: {why}", self.outgoing.leg().transport())).await;
        Ok(())
    }

    /// The guest's RAM, if it is to be and can be read directly. What QEMU announced until then is nobody's concern: it began a migration that
    /// was cancelled.
    async fn directly(&mut self, chunk: usize) -> Option<Direct> {
        let fit = match self.direct.take()? {
            Ok(fit) => direct::begin(&self.guest, fit, chunk).await,
            Err(why) => Err(why),
        };
        self.qmp = self.guest.reach().await.ok().map(|qemu| qemu.events());
        match fit {
            Ok(direct) => {
                self.report.reads_directly();
                Some(direct)
            }
            Err(why) => {
                warn!(why, "the guest's RAM is not read directly");
                self.report.fallback(not_direct(&why));
                None
            }
        }
    }

    /// Lets QEMU connect to a socket of ours as often as it has channels. The socket's file is gone afterwards.
    async fn open_channels(&self, qemu: &Qemu) -> Result<socket::Channels, Failure> {
        let name: String = nonce()?[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        let listener =
            MigrationListener::bind_secret(&self.shared.config.sockets, &name).map_err(socket_failure)?;
        let channels = socket::open_channels(qemu, &listener, self.channels.count().into()).await;
        channels.map_err(open_failure)
    }
}

/// Asks the VMM how far it is. A task of its own: while QEMU writes the last of its stream it holds the lock that QMP needs, so
/// an answer may have to wait for the very data path that the migration's task serves.
/// With the direct source there is nothing to ask before `last` is told.
async fn monitor(
    guest: Arc<Guest>,
    counters: Arc<Counters>,
    info: mpsc::Sender<MigrationInfo>,
    last: oneshot::Receiver<()>,
) {
    // Gone without a word: the data path has failed, and whoever drives the migration learns it from there.
    if last.await.is_err() {
        return;
    }
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told = 0.0;
    loop {
        tick.tick().await;
        // How fast the last round will really go: what the link carries, counted in the VMM's bytes.
        let ratio = counters.raw.load() as f64 / counters.wire.load().max(1) as f64;
        let rate = counters.rate.load() as f64 * ratio;
        if rate > 0.0 && (rate / told - 1.0).abs() > TELL_RATE {
            told = rate;
            let parameters =
                Parameters { avail_switchover_bandwidth: Some(rate as u64), ..Parameters::default() };
            let outcome = match guest.reach().await {
                Ok(qemu) => qemu.set_parameters(&parameters).await,
                Err(error) => Err(error),
            };
            if let Err(error) = outcome {
                debug!(%error, "the measured rate was not told to QEMU");
            }
        }
        if let Ok(qemu) = guest.reach().await
            && let Ok(answer) = qemu.migration().await
            && info.send(answer).await.is_err()
        {
            return;
        }
    }
}
