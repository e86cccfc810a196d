"""AWS as far as `ray up` knows it: moto's EC2 and IAM on a host of the lab, and instances that are hosts of it too."""

from __future__ import annotations

import json
import subprocess
import time
from threading import Thread
from typing import Any

from tests.cluster.lab import LAPTOP, Lab

CLOUD = "cloud"
CLOUD_ADDRESS = "10.77.0.2"
METADATA_ADDRESS = "169.254.169.254"  # where AWS gives an instance the credentials of its profile
REGION = "us-west-2"
ENVIRONMENT = f"export AWS_ENDPOINT_URL=http://{CLOUD_ADDRESS}"
CREDENTIALS = "[default]\\naws_access_key_id = user\\naws_secret_access_key = secret\\n"
KEY = f"~/.ssh/ray-autoscaler_{REGION}.pem"  # where Ray keeps the key pair that it makes


class Ec2:
    """AWS, from when this is made to the end of the lab; the laptop has its user's credentials.

    A running instance is a host with the instance's addresses, which the key pair opens; it ends with the instance.

    Args:
        lab: whose hosts have ENVIRONMENT.
        login: the image's user.

    Attributes:
        image: ID of an image.
        security_group: ID of one that is the user's.
        instances: all there have been, by their IDs, as AWS describes them.
    """

    def __init__(self, lab: Lab, login: str):
        self.lab, self.login = lab, login
        self.instances: dict[str, dict[str, Any]] = {}
        lab.run(LAPTOP, f"mkdir ~/.aws && printf '{CREDENTIALS}' > ~/.aws/credentials")
        lab.add(CLOUD, CLOUD_ADDRESS, METADATA_ADDRESS)
        words = lab.command(CLOUD, f"cd {lab.repository} && python -m tests.cluster.ec2 2>/tmp/ec2.log")
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        said = self.process.stdout.readline()
        assert said, lab.run(CLOUD, "cat /tmp/ec2.log")
        self.image, self.security_group = json.loads(said)
        Thread(target=self._follow, daemon=True).start()

    def running(self, node_type: str | None = None) -> list[str]:
        """Return the IDs of instances that run, of all or of one of Ray's node types."""
        return [
            name
            for name, instance in self.instances.items()
            if instance["State"]["Name"] == "running" and node_type in (None, node_type_of(instance))
        ]

    def host(self, instance: str) -> str:
        """Return the name of an instance's host."""
        return instance[:12]

    def take_away(self, instance: str) -> None:
        """End an instance, as AWS does with a spot instance that it needs elsewhere."""
        code = f"import boto3; boto3.client('ec2', '{REGION}').terminate_instances(InstanceIds=['{instance}'])"
        self.lab.run(LAPTOP, f'python -c "{code}"')

    def _follow(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            for instance in json.loads(line):
                name, state = instance["InstanceId"], instance["State"]["Name"]
                host, there = self.host(name), self.host(name) in self.lab.logins
                if state == "running" and not there:
                    key = self.lab.run(LAPTOP, f"ssh-keygen -y -f {KEY}").strip()
                    addresses = instance["PrivateIpAddress"], instance["PublicIpAddress"]
                    self.lab.add(host, *addresses, login=self.login, key=key)
                if state == "terminated" and there:
                    self.lab.remove(host)
                self.instances[name] = instance
        self.process.wait()


def node_type_of(instance: dict[str, Any]) -> str:
    """Return the node type of Ray's that an instance is."""
    tags: dict[str, str] = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
    return tags["ray-user-node-type"]


def main() -> None:
    """Serve EC2 and IAM to the lab; say the account's image and security group, then all instances when one changes."""
    import boto3
    from moto.server import ThreadedMotoServer

    ThreadedMotoServer("0.0.0.0", 80, verbose=False).start()
    access = {"region_name": REGION, "aws_access_key_id": "owner", "aws_secret_access_key": "secret"}
    ec2, iam = boto3.client("ec2", **access), boto3.client("iam", **access)
    prepare_profiles(iam)
    image = ec2.register_image(Name="ubuntu", RootDeviceName="/dev/sda1")["ImageId"]
    group = ec2.create_security_group(GroupName="invdyn", Description="invdyn")["GroupId"]
    print(json.dumps([image, group]), flush=True)
    last = ""
    while True:
        found = [instance for group in ec2.describe_instances()["Reservations"] for instance in group["Instances"]]
        if (line := json.dumps(found, default=str)) != last:
            print(line, flush=True)
        last = line
        time.sleep(0.5)


def prepare_profiles(iam: Any) -> None:
    """Make the instance profiles that docs/cluster.md makes."""
    for name in ("invdyn-head", "invdyn-worker"):
        iam.create_role(RoleName=name, AssumeRolePolicyDocument="{}")
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)


if __name__ == "__main__":
    main()
