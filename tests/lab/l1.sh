#!/lab/busybox sh
# L1: a host with KVM that runs the jobs, one after the other, and says so on its second serial
# port. Each job is a directory with a script `run`, which leaves its exit code to us and its files
# in the directory.
export PATH=/bin
/lab/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t debugfs debug /sys/kernel/debug
mount -t tracefs trace /sys/kernel/tracing
ln -s /proc/self/fd /dev/fd
exec 9>/dev/ttyS1

seconds() {
    read -r up rest </proc/uptime
    echo "${up%.*}"
}

for module in $(cat /lab/host/order); do insmod /lab/host/$module; done
if [ -c /dev/kvm ]; then echo "up $(seconds)" >&9; else echo "nokvm" >&9; fi
for job in $(cat /lab/jobs); do
    echo "begin $job $(seconds)" >&9
    cd /lab/job/$job
    sh ./run >run.log 2>&1 </dev/null
    echo "end $job $? $(seconds)" >&9
    cd /
    sync
done
mount -o remount,ro /
echo "done" >&9
poweroff -f
